"""Describe a run from its recipe, shards and model configuration (`--dry_run`), without weights or GPU."""

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.common.distributed import local_device
from pipeline.common.hardware import device_called
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.memory import estimate_memory
from pipeline.plan.model_facts import model_stats
from pipeline.plan.tables import memory_table, traffic_table
from pipeline.plan.workload import PlannedRun, Workload
from pipeline.training.preflight import PreparedRun
from pipeline.zero3.cluster_speeds import cluster_speeds


def print_dry_run(prepared: PreparedRun, ds: dict[str, Any], ranks: int, ranks_per_node: int) -> None:
    """Print parameter counts, tokens and pairs per step, steps, memory per rank and, on several ranks, bytes per step.

    The vocabulary size of `prepared.model_config` becomes the padded one.
    """
    prepared.model_config.vocab_size = prepared.padded_size
    stats = model_stats(prepared.model_config, prepared.config.model.adapter)
    gpu = local_device().type == "cuda"
    device = device_called(torch.cuda.get_device_name()) if gpu else None
    run = PlannedRun(
        prepared.config,
        stats,
        ZeroSettings.from_config(ds),
        Workload.from_manifest(prepared.shards.manifest),
        ranks,
        gpu=gpu,
        mask_copies=device.attention_copies_mask if device else True,
        speeds=cluster_speeds(device, prepared.config.training.precision, ranks_per_node),
    )
    table = Table(title=f"dry run: {prepared.config.output_dir}", show_header=False)
    table.add_row("model", f"{prepared.model_config.model_type}, {stats.parameters:,} parameters")
    table.add_row("  of which vocabulary", f"{sum(stats.vocabulary):,} ({prepared.padded_size:,} rows)")
    if stats.adapter.r is not None:
        table.add_row("  of which trained", f"{sum(stats.matrices + stats.vectors):,}")
    table.add_row("ranks", f"{ranks} ({prepared.padded_size // run.vocabulary_ranks:,} vocabulary rows each)")
    for key, value in workload_summary(prepared).items():
        table.add_row(key, f"{value:,}")
    console = Console()
    console.print(table)
    console.print(memory_table(run, estimate_memory(run)))
    if ranks > 1:
        console.print(traffic_table(run, ranks_per_node))


def workload_summary(run: PreparedRun) -> dict[str, Any]:
    """Compute the workload per step from the manifests of the shards, their sampling weights and the batch sizes.

    Sampling weights count as those of whole shard directories: rows of one directory are taken as equal.
    """
    training = run.config.training
    sizes = [len(source) for source in run.shards.sources]
    weights = np.ones(sum(sizes)) if run.loader.row_weights is None else run.loader.row_weights
    by_source = np.add.reduceat(weights, np.cumsum([0, *sizes[:-1]])) / weights.sum()
    rows_per_step = training.train_batch_size * by_source

    def per_step(count: str) -> float:
        totals = [sum(shard[count] for shard in source.manifest["shards"]) for source in run.shards.sources]
        return float(sum(rows_per_step * totals / sizes))

    validation = {} if run.eval_shards is None else {"validation rows": len(run.eval_shards)}
    return {
        "rows": len(run.shards),
        **validation,
        "tokens per step": round(per_step("tokens")),
        "target tokens per step": round(per_step("supervised_tokens")),
        "pairs per step": round(per_step("pairs"), 1),
        "accumulation steps": run.loader.split.accumulation_steps,
        "steps per epoch": round(len(run.shards) / training.train_batch_size, 2),
        "steps": run.max_steps,
    }

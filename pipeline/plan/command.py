"""Predict a run from its recipe, print the prediction, or suggest the fastest settings that fit."""

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed is only used to read a configuration

from data_prep.shards.format import MANIFEST, read_manifest
from pipeline.common.errors import UserError
from pipeline.common.hardware import load_device
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.data.mixture import merge_manifests, shard_directories
from pipeline.models.loading import load_model_config, padded_vocab_size
from pipeline.models.middle_layer import check_layer
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import model_stats
from pipeline.plan.prediction import GIB, Cluster, Prediction
from pipeline.plan.suggest import NO_OFFLOAD, OPTIMIZER_AND_PARAMETERS, TunableSettings, nearest_fit, reasons, suggest
from pipeline.plan.tables import memory_table, time_table, traffic_table
from pipeline.plan.workload import PlannedRun, Workload
from pipeline.training.preflight import count_steps
from pipeline.training.rank_checks import check_ranks, check_sequence_parallel

GROUP_PACKING_EFFICIENCY = 0.985  # of packing whole groups; used if there are no shards yet


def load_workload(config: Config, options: argparse.Namespace) -> tuple[Workload, int]:
    """Read the workload from the recipe's shards, or compute it from command-line options.

    Returns:
        The workload, and the vocabulary size of the tokenizer, or 1 if it is unknown.

    Raises:
        UserError: the shards are empty, or there are no shards and the options that replace them are missing.
    """
    paths = shard_directories(config.data.shards)
    shards = ", ".join(map(str, paths))
    if all((path / MANIFEST).exists() for path in paths) and options.max_seq_length is None:
        manifest = merge_manifests([read_manifest(path) for path in paths])
        if not manifest["totals"]["rows"]:
            raise UserError(f"{shards}: the shards contain no rows; pack different data")
        return Workload.from_manifest(manifest), manifest["tokenizer"]["vocab_size"]
    if options.max_seq_length is None or options.rows is None:
        raise UserError(f"{shards}: no packed shards; give --max_seq_length and --rows, or pack first")
    tokens = GROUP_PACKING_EFFICIENCY * options.max_seq_length
    sequences = tokens / options.sequence_tokens
    pairs = sequences * (options.languages - 1) / options.languages
    target_tokens = tokens * options.supervised_share
    return Workload(options.max_seq_length, tokens, target_tokens, sequences, pairs, options.rows), 1


def predict(options: argparse.Namespace, keys: list[str]) -> tuple[Prediction, dict[str, Any]]:
    """Predict a run from command-line options and the recipe with the overrides `keys`.

    Returns:
        The prediction, and the complete DeepSpeed configuration of the run.

    Raises:
        UserError: the recipe, the shards, the model or the cluster is invalid, or they are inconsistent.
    """
    config = load_config(options.config, keys)
    cluster = Cluster(options.nodes, options.gpus_per_node, load_device(options.gpu))
    workload, tokenizer_size = load_workload(config, options)
    if config.model.config is not None and tokenizer_size == 1 and "vocab_size" not in config.model.config:
        raise UserError(f"{options.config}: set model.config.vocab_size; it is unknown without shards")
    model_config = load_model_config(config.model, tokenizer_size)
    model_config.vocab_size = padded_vocab_size(model_config.vocab_size, config.model.vocab_multiple)
    check_ranks(config.training, model_config.vocab_size, cluster.ranks)
    check_sequence_parallel(config, model_config)
    check_layer(config.loss, model_config)

    from pipeline.zero3.ds_config import deepspeed_config

    max_steps = count_steps(config.training, workload.dataset_rows)
    ds = deepspeed_config(config, cluster.ranks, model_config.hidden_size, max_steps, device="cuda")
    run = PlannedRun(
        config,
        model_stats(model_config, config.model.adapter),
        ZeroSettings.from_config(ds),
        workload,
        cluster.ranks,
        mask_copies=cluster.device.attention_copies_mask,
        speeds=cluster.speeds(config.training.precision),
    )
    return Prediction(run, cluster), ds


def show(prediction: Prediction, console: Console) -> None:
    """Print memory, traffic and time, and whether the run fits. If not, print the nearest settings that fit."""
    run, cluster, device = prediction.run, prediction.cluster, prediction.cluster.device
    trained = f" ({sum(run.stats.matrices + run.stats.vectors):,} trained)" if run.stats.adapter.r is not None else ""
    console.print(
        f"{run.stats.config.model_type}, {run.stats.parameters:,} parameters{trained}, on {cluster.nodes} x "
        f"{cluster.per_node} {device.name}: {run.micro_batch_size} x {run.row_tokens} tokens per rank and "
        f"micro-step, {run.gradient_accumulation_steps} micro-steps, head {run.head}"
    )
    console.print(memory_table(run, prediction.memory))
    if prediction.transfers:
        console.print(traffic_table(run, cluster.per_node, prediction.time.messages))
    console.print(time_table(prediction))
    needed, available = prediction.memory.peak / GIB, prediction.available / GIB
    if prediction.host_bytes:
        console.print(f"Each node needs {prediction.host_bytes / GIB:.0f} GiB of CPU memory.")
    if prediction.fits:
        reserve = f"{device.reserve_gib:g} GiB of each GPU are reserved"
        console.print(f"It fits: {needed:.1f} of {available:.1f} GiB ({reserve}).")
        return
    if needed > available:
        phase = prediction.memory.peak_phase
        console.print(
            f"It does not fit: {needed:.1f} GiB of {available:.1f} GiB available; the peak is in the {phase}."
        )
    else:
        host = f"{prediction.host_bytes / GIB:.0f} GiB of {device.host_memory_gib:g} GiB"
        console.print(f"It does not fit: offloading needs {host} of CPU memory on each node.")
    nearest = nearest_fit(prediction)
    if nearest is None:
        console.print("No settings of this recipe fit on up to 4096 GPUs; use a larger GPU or a smaller model.")
        return
    changes, other = nearest
    ratio = other.time.overlapped / prediction.time.overlapped
    console.print(f"Nearest settings that fit: {changes} ({other.memory.peak / GIB:.1f} GiB, {ratio:.2f} x the time).")


def make_suggestion(prediction: Prediction, ds: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe and the DeepSpeed configuration with the fastest settings that fit, and the reasons.

    Raises:
        UserError: no settings fit.
    """
    result = suggest(prediction)
    if result is None:
        nearest = nearest_fit(prediction)
        hint = f"; {nearest[0]} would fit" if nearest else ""
        raise UserError(f"no settings fit {prediction.cluster.ranks} x {prediction.cluster.device.name}{hint}")
    settings, chosen = result
    return {
        "recipe": _suggested_recipe(recipe, settings),
        "deepspeed": _suggested_deepspeed(ds, settings),
        "reasons": reasons(settings, chosen),
        "plan": chosen.as_json(),
    }


def _suggested_recipe(recipe: dict[str, Any], settings: TunableSettings) -> dict[str, Any]:
    result = json.loads(json.dumps(recipe))
    result.setdefault("model", {})["activation_checkpointing"] = settings.checkpointing
    result.setdefault("loss", {}).update(head=settings.head, memory_budget_mb=settings.budget_mb)
    result.setdefault("training", {})["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
    return result


def _suggested_deepspeed(ds: dict[str, Any], settings: TunableSettings) -> dict[str, Any]:
    """Return the DeepSpeed file without the keys that the trainer sets from the recipe."""
    filled_in = (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("gradient_clipping", "timers"),
    )
    result = {key: value for key, value in ds.items() if key not in filled_in}
    zero = {key: v for key, v in ds["zero_optimization"].items() if not key.startswith("offload")}
    if not zero.get("memory_efficient_linear", True):
        del zero["memory_efficient_linear"]  # the trainer sets it if the suggested settings allow it
    cpu = {"device": "cpu", "pin_memory": True}
    if settings.offload != NO_OFFLOAD:
        zero["offload_optimizer"] = cpu
    if settings.offload == OPTIMIZER_AND_PARAMETERS:
        zero["offload_param"] = cpu
    return result | {"zero_optimization": zero}


def show_suggestion(suggestion: dict[str, Any], console: Console) -> None:
    """Print the reasons, the prediction, the recipe and the DeepSpeed file of a suggestion."""
    table = Table("setting", "value", "alternatives")
    table.columns[0].overflow = "fold"
    for row in suggestion["reasons"]:
        table.add_row(*row)
    console.print(table)
    plan = suggestion["plan"]
    console.print(
        f"{plan['seconds']['overlapped']:.3f} s per step, {plan['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {100 * plan['mfu']:.1f} %, {plan['memory_bytes']['peak'] / GIB:.1f} GiB per GPU"
    )
    recipe = yaml.safe_dump(suggestion["recipe"], sort_keys=False)
    deepspeed = json.dumps(suggestion["deepspeed"], indent=2)
    for title, text in (("the recipe", recipe), ("its DeepSpeed file: name it in the recipe's `deepspeed`", deepspeed)):
        console.print(f"# {title}", text, sep="\n", highlight=False, markup=False, soft_wrap=True)


def recipe_tree(config: Config) -> dict[str, Any]:
    """Return the keys whose values differ from the defaults, nested as in a recipe."""

    def differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(defaults.get(key), dict):
                value = differing(value, defaults[key])
                if value:
                    result[key] = value
            elif value != defaults.get(key):
                result[key] = list(value) if isinstance(value, tuple) else value
        return result

    return differing(asdict(config), asdict(Config()))

"""Scaling curves to 1,024 GPUs from the plan's formulae, and of preprocessing: rows to CSV and plots.

    python -m pipeline.benchmarks.scale --out docs/bench/scale

For four published models on H100s, weak scaling (16 rows of 4,096 tokens per GPU and step) and strong scaling (1,024
rows per step), three ways to divide the loss, plain ZeRO-3 with full logits, and `auto` with persistent parameters
gathered one by one. Micro-batch, checkpointing and buffer are for each point the fastest that fit. Nothing is measured
here; `python -m pipeline.benchmarks.plan` holds the formulae to what is.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from pipeline.benchmarks.loss import ROOT, write
from pipeline.benchmarks.scale_variants import FullLogitsPlan, OneByOnePlan
from pipeline.common.errors import exit_cleanly
from pipeline.common.hardware import load_device
from pipeline.config.settings import Config, LossSettings, TrainingSettings
from pipeline.models.loading import padded_vocab_size
from pipeline.plan.corpus import Corpus
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import ModelFacts, model_facts
from pipeline.plan.prediction import GIB, Cluster, Plan
from pipeline.plan.workload import Run, Workload

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
WAYS = ("auto", "vocab_parallel", "gathered", "full_logits", "one_by_one")
MICRO = (1, 2, 4, 8, 16)
BUDGETS_MB = (32.0, 128.0, 512.0, 2048.0)
# A row of 4,096 tokens: sequences of 256 in 8 languages, 60 % of them supervised, 98.5 % filled.
WORK = Workload(4096, 4034, 2420, 15.8, 13.8, 1_000_000)
# ds_configs/zero3_bf16.json, whose sizes suit GPUs.
ZERO = ZeroSettings(
    500_000_000, 200_000_000, 2_000_000_000, 2_000_000_000, 1_000_000, 1_000_000_000, True, True, False, False
)


def published() -> dict[str, dict[str, Any]]:
    """Name -> configuration fields."""
    return yaml.safe_load((ROOT / "pipeline" / "plan" / "published.yaml").read_text(encoding="utf-8"))


def facts_of(fields: dict[str, Any], multiple: int = 1024) -> ModelFacts:
    config = AutoConfig.for_model(**fields)
    config.vocab_size = padded_vocab_size(config.vocab_size, multiple)
    return model_facts(config)


def best(facts: ModelFacts, gpus: int, rows: int, way: str, gpu: str) -> Plan | None:
    """The fastest settings of a point that fit, or None."""
    device, found = load_device(gpu), []
    for micro in (m for m in MICRO if rows % (m * gpus) == 0):
        for checkpointing in (False, True):
            for budget in BUDGETS_MB if way != "full_logits" else BUDGETS_MB[:1]:
                head: Any = {"full_logits": "vocab_parallel", "one_by_one": "auto"}.get(way, way)
                config = Config(
                    loss=LossSettings(head=head, memory_budget_mb=budget),
                    training=TrainingSettings(train_batch_size=rows, train_micro_batch_size_per_gpu=micro),
                )
                config = replace(config, model=replace(config.model, activation_checkpointing=checkpointing))
                run = Run(config, facts, ZERO, WORK, gpus, mask_copies=device.attention_copies_mask)
                kind = {"full_logits": FullLogitsPlan, "one_by_one": OneByOnePlan}.get(way, Plan)
                plan = kind(run, Cluster(gpus // 8, 8, device))
                if plan.fits:
                    found.append(plan)
    return min(found, key=lambda plan: (plan.time.overlapped, plan.time.serial), default=None)


def point(name: str, facts: ModelFacts, mode: str, gpus: int, way: str, gpu: str) -> dict[str, Any]:
    """One row; empty figures where nothing fits."""
    rows = 16 * gpus if mode == "weak" else 1024
    result: dict[str, Any] = {"model": name, "mode": mode, "gpus": gpus, "rows_per_step": rows, "way": way}
    keys = (
        *("head", "micro", "checkpointing", "budget_mb", "peak_gib", "step_s"),
        *("tokens_per_s_per_gpu", "mfu", "received_gb", "between_nodes_gb"),
    )
    plan = best(facts, gpus, rows, way, gpu)
    if plan is None:
        return result | dict.fromkeys(keys, "")
    values = (
        "full_logits" if way == "full_logits" else plan.run.head,
        plan.run.rows,
        plan.run.checkpointing,
        plan.run.config.loss.memory_budget_mb if way != "full_logits" else "",
        round(plan.memory.peak / GIB, 1),
        round(plan.time.overlapped, 3),
        round(plan.tokens_per_second / gpus, 1),
        round(plan.mfu, 4),
        round(sum(t.received for t in plan.transfers) / 1e9, 2),
        round(plan.between_nodes() / 1e9, 2),
    )
    return result | dict(zip(keys, values, strict=True))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6.5), layout="constrained", sharex=True)
    styles = {"auto": "k-", "vocab_parallel": "C0--o", "gathered": "C1--s", "full_logits": "C3:x"}
    for column, name in enumerate(names):
        for line, mode in enumerate(("weak", "strong")):
            axis = axes[line, column]
            for way, style in styles.items():
                mine = [r for r in rows if (r["model"], r["mode"], r["way"]) == (name, mode, way) and r["step_s"] != ""]
                axis.plot([r["gpus"] for r in mine], [r["tokens_per_s_per_gpu"] for r in mine], style, label=way, ms=4)
            axis.set(xscale="log", ylim=(0, None), title=f"{name}, {mode}")
            axis.set_xticks(GPUS, [str(n) for n in GPUS], fontsize=7)
            axis.minorticks_off()
        axes[1, column].set_xlabel("GPUs")
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens/s per GPU, predicted")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def corpus_rows() -> list[dict[str, Any]]:
    """Preprocessing for 10^6 to 10^9 pairs on 1 to 1,024 ranks."""
    rows = []
    for exponent in (6, 7, 8, 9):
        for ranks in (1, 16, 128, 1024):
            c = Corpus(10**exponent, ranks)
            rows.append(
                {
                    "pairs": f"1e{exponent}",
                    "ranks": ranks,
                    "input_gb": round(c.input_bytes / 1e9, 2),
                    "tokens": f"{c.tokens:.3g}",
                    "pieces": c.pieces,
                    "windows": c.windows,
                    "shards": c.shards,
                    "disk_gb": round(c.disk_bytes / 1e9, 2),
                    "memory_of_all_ranks_gb": round(ranks * 0.48, 2),
                    "index_share": round(c.index_seconds / c.ranks / c.seconds, 3),
                    "seconds": round(c.seconds, 1),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "scale", help="path without .csv, .png")
    parser.add_argument("--gpu", default="h100", help="as of python -m pipeline.plan")
    args = parser.parse_args()
    rows = []
    for name, fields in published().items():
        facts = facts_of(fields)
        for mode in ("weak", "strong"):
            rows += [point(name, facts, mode, gpus, way, args.gpu) for gpus in GPUS for way in WAYS]
        print(f"{name}: {sum(row['model'] == name and row['step_s'] != '' for row in rows)} points fit", flush=True)
    write(rows, args.out.with_suffix(".csv"))
    write(corpus_rows(), args.out.with_name(f"{args.out.name}_data.csv"))
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    exit_cleanly(main)

"""Predict the scaling of training to 1,024 GPUs and the scaling of preprocessing. Writes CSVs and plots.

    python -m pipeline.benchmarks.scale --out docs/bench/scale

Covers published models on H100 GPUs, with weak scaling (16 rows of 4,096 tokens per GPU and step) and strong scaling
(1,024 rows per step). Variants: the loss with each LM head implementation and with `auto` (the one with less predicted
time); plain ZeRO-3 with full logits; `auto` with persistent parameters gathered one by one. Each point uses the fastest
combination of micro-batch size, activation checkpointing and loss buffer that fits. Nothing is measured here.
`python -m pipeline.benchmarks.plan` compares the formulas with measurements.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from pipeline.benchmarks.common import OUTPUT, Row, pyplot, write_csv
from pipeline.benchmarks.scale_variants import FullLogitsPrediction, OneByOnePrediction
from pipeline.common.errors import exit_cleanly
from pipeline.common.hardware import load_device
from pipeline.config.settings import Config, LossSettings, TrainingSettings
from pipeline.loss.settings import GPU_BUDGET_MB
from pipeline.models.loading import padded_vocab_size
from pipeline.plan.corpus import PackingRun
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import ModelStats, model_stats
from pipeline.plan.prediction import GIB, Cluster, Prediction
from pipeline.plan.workload import PlannedRun, Workload

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SCALE_VARIANTS = ("auto", "vocab_parallel", "gathered", "full_logits", "one_by_one")
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
SCALE_BUDGETS_MB = (32.0, 128.0, 512.0, GPU_BUDGET_MB)
# A row of 4,096 tokens: sequences of 256 tokens in 8 languages, 60 % target tokens, packing efficiency 98.5 %.
WORKLOAD = Workload(4096, 4034, 2420, 15.8, 13.8, 1_000_000)
# The sizes of ds_configs/zero3_bf16.json.
ZERO = ZeroSettings(
    500_000_000, 200_000_000, 2_000_000_000, 2_000_000_000, 1_000_000, 1_000_000_000, True, True, False, False
)


def published_models() -> dict[str, dict[str, Any]]:
    """Return the configuration fields of published models, by name."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def published_model_stats(fields: dict[str, Any], vocab_multiple: int = 1024) -> ModelStats:
    """Return the sizes of a model with these configuration fields, with a padded vocabulary."""
    config = AutoConfig.for_model(**fields)
    config.vocab_size = padded_vocab_size(config.vocab_size, vocab_multiple)
    return model_stats(config)


def predictions(stats: ModelStats, gpus: int, rows: int, variant: str, gpu: str) -> Iterator[Prediction]:
    """Yield the predictions for all settings. `rows` is the number of rows per optimizer step over all GPUs."""
    device = load_device(gpu)
    cluster = Cluster(gpus // 8, 8, device)
    head: Any = {"full_logits": "vocab_parallel", "one_by_one": "auto"}.get(variant, variant)
    prediction_class = {"full_logits": FullLogitsPrediction, "one_by_one": OneByOnePrediction}.get(variant, Prediction)
    micro_batch_sizes = [size for size in MICRO_BATCH_SIZES if rows % (size * gpus) == 0]
    budgets = SCALE_BUDGETS_MB if variant != "full_logits" else SCALE_BUDGETS_MB[:1]
    for micro_batch_size, checkpointing, budget in product(micro_batch_sizes, (False, True), budgets):
        config = Config(
            loss=LossSettings(head=head, memory_budget_mb=budget),
            training=TrainingSettings(train_batch_size=rows, train_micro_batch_size_per_gpu=micro_batch_size),
        )
        config = replace(config, model=replace(config.model, activation_checkpointing=checkpointing))
        speeds = cluster.speeds(config.training.precision)
        run = PlannedRun(config, stats, ZERO, WORKLOAD, gpus, True, device.attention_copies_mask, speeds=speeds)
        yield prediction_class(run, cluster)


def point(name: str, stats: ModelStats, mode: str, gpus: int, variant: str, gpu: str) -> Row:
    """Return the CSV row of the fastest settings that fit. Its values are empty if none fits."""
    rows = 16 * gpus if mode == "weak" else 1024
    point: Row = {"model": name, "mode": mode, "gpus": gpus, "rows_per_step": rows, "way": variant}
    keys = (
        *("head", "micro", "checkpointing", "budget_mb", "peak_gib", "step_s"),
        *("tokens_per_s_per_gpu", "mfu", "received_gb", "between_nodes_gb"),
    )
    fitting = [prediction for prediction in predictions(stats, gpus, rows, variant, gpu) if prediction.fits]
    if not fitting:
        return point | dict.fromkeys(keys, "")
    best = min(fitting, key=lambda prediction: (prediction.time.overlapped, prediction.time.serial))
    full_logits = variant == "full_logits"
    values = (
        "full_logits" if full_logits else best.run.head,
        best.run.micro_batch_size,
        best.run.checkpointing,
        "" if full_logits else best.run.config.loss.memory_budget_mb,
        round(best.memory.peak / GIB, 1),
        round(best.time.overlapped, 3),
        round(best.tokens_per_second / gpus, 1),
        round(best.mfu, 4),
        round(sum(t.received for t in best.transfers) / 1e9, 2),
        round(best.between_nodes() / 1e9, 2),
    )
    return point | dict(zip(keys, values, strict=True))


def plot(rows: list[Row], path: Path) -> None:
    """Plot the tokens/s per GPU against the number of GPUs: one column per model, one row per scaling mode."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    size = (4 * len(names), 6.5)
    figure, axes = pyplot().subplots(2, len(names), figsize=size, layout="constrained", sharex=True)
    styles = {"auto": "k-", "vocab_parallel": "C0--o", "gathered": "C1--s", "full_logits": "C3:x"}
    for column, name in enumerate(names):
        for line, mode in enumerate(("weak", "strong")):
            axis = axes[line, column]
            fitting = [r for r in rows if (r["model"], r["mode"]) == (name, mode) and r["step_s"] != ""]
            for variant, style in styles.items():
                rates = {r["gpus"]: r["tokens_per_s_per_gpu"] for r in fitting if r["way"] == variant}
                axis.plot(list(rates), list(rates.values()), style, label=variant, ms=4)
            axis.set(xscale="log", ylim=(0, None), title=f"{name}, {mode}")
            axis.set_xticks(GPUS, [str(n) for n in GPUS], fontsize=7)
            axis.minorticks_off()
        axes[1, column].set_xlabel("GPUs")
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens/s per GPU, predicted")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def packing_rows() -> list[Row]:
    """Predict preprocessing of 10^6 to 10^9 pairs on 1 to 1,024 ranks."""
    rows = []
    for exponent, ranks in product((6, 7, 8, 9), (1, 16, 128, 1024)):
        run = PackingRun(10**exponent, ranks)
        rows.append(
            {
                "pairs": f"1e{exponent}",
                "ranks": ranks,
                "input_gb": round(run.input_bytes / 1e9, 2),
                "tokens": f"{run.tokens:.3g}",
                "pieces": run.splits,
                "windows": run.windows,
                "shards": run.shards,
                "disk_gb": round(run.disk_bytes / 1e9, 2),
                "memory_of_all_ranks_gb": round(run.memory_bytes / 1e9, 2),
                "index_share": round(run.index_seconds / run.ranks / run.seconds, 3),
                "seconds": round(run.seconds, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT / "scale", help="output path without .csv and .png")
    parser.add_argument("--gpu", default="h100", help="as in python -m pipeline.plan")
    args = parser.parse_args()
    rows: list[Row] = []
    for name, fields in published_models().items():
        stats = published_model_stats(fields)
        for mode in ("weak", "strong"):
            rows += [point(name, stats, mode, gpus, variant, args.gpu) for gpus in GPUS for variant in SCALE_VARIANTS]
        print(f"{name}: {sum(row['model'] == name and row['step_s'] != '' for row in rows)} points fit", flush=True)
    write_csv(rows, args.out.with_suffix(".csv"))
    write_csv(packing_rows(), args.out.with_name(f"{args.out.name}_data.csv"))
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    exit_cleanly(main)

"""Measure time and memory of full training steps: SOLAR, variants of it, and two baselines.

    python -m pipeline.benchmarks.step --ranks 2 --vocab_size 65536 --hidden_size 256 --output docs/bench/train_cpu.csv

The variants of SOLAR are alignment weight 0; attention with a mask over the row (sdpa); ZeRO-3 hooks on every module
instead of whole layers; persistent parameters gathered one by one after a step, as DeepSpeed does; DeepSpeed's
throughput timer, which DeepSpeed enables by default; and Liger's kernels. The baselines are plain DeepSpeed with full
logits, and plain fine-tuning by TRL. Each trains a randomly initialized Qwen2 on random packed rows in separate
processes. Variants run in turn for `rounds` rounds. Time is the median step time over
all rounds. The processor time of a rank is more robust if the machine is shared. Memory is the peak of a rank minus its
memory after the engine has been built. On a GPU, `idle` is the fraction of a step in which it runs no kernel, and `mfu`
the fraction of its peak (`pipeline/common/hardware`) that forward and backward reach, recomputation not counted.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.common import (
    Row,
    machine,
    memory_in_use_gb,
    random_batch,
    run_ranks,
    write_csv,
)
from pipeline.benchmarks.gpu_profile import profile_step
from pipeline.benchmarks.shapes import SHAPES, published_fields, training_flops
from pipeline.benchmarks.step_variants import (
    INSTALLED,
    LEARNING_RATE,
    SOLAR,
    STEP_VARIANTS,
    TRL,
    build_variant,
    deepspeed_config_of,
    fields_of,
)
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.common.hardware import device_called
from pipeline.data.micro_batch import MicroBatch, local_normalizers
from pipeline.loss import LossNormalizers
from pipeline.training.metrics import peak_memory_gb

SIZES = ("ranks", "vocab_size", "hidden_size", "layers", "rows", "tokens", "sequence", "micro_batches")
WARM_UP_STEPS = 1
LONGEST_KERNELS = 15


def fill_sizes(args: argparse.Namespace) -> None:
    """Set the sizes that `--model` or the defaults determine."""
    if args.model is None:
        args.layers = args.layers or 4
        return
    fields = published_fields(args.model, args.layers)
    args.vocab_size, args.hidden_size = fields["vocab_size"], fields["hidden_size"]
    args.layers, args.tied = fields["num_hidden_layers"], fields["tie_word_embeddings"]


def run_variant(args: argparse.Namespace) -> None:
    """Train one variant on this rank. Rank 0 prints its measurements as JSON."""
    from pipeline.zero3.process_group import start_process_group

    start_process_group()
    result = measure_trl(args) if args.variant == TRL else measure_steps(args)
    if distributed.is_main_process():
        print(json.dumps(result), flush=True)
    distributed.shut_down()


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Return step times and memory of one variant and, on a GPU, idle time and the longest kernels of a step."""
    train_on_batches = build_variant(args)
    vocab_size = fields_of(args)["vocab_size"]

    def inputs(step: int) -> tuple[list[MicroBatch], LossNormalizers]:
        numbers = range(step * args.micro_batches, (step + 1) * args.micro_batches)
        batches = [random_batch(vocab_size, args.rows, args.tokens, args.sequence, n) for n in numbers]
        local = local_normalizers(batches)
        return batches, LossNormalizers(local.tokens * args.ranks, local.pairs * args.ranks)

    before, times, processor_times = memory_in_use_gb(), [], []
    for step in range(WARM_UP_STEPS + args.steps):
        batches = inputs(step)
        started, processor_started = time.perf_counter(), time.process_time()
        train_on_batches(*batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        processor_times.append(time.process_time() - processor_started)
    result: dict[str, Any] = {"times": times[WARM_UP_STEPS:], "processor_times": processor_times[WARM_UP_STEPS:]}
    result["memory_gb"] = peak_memory_gb() - before
    if torch.cuda.is_available():
        batches = inputs(len(times))
        idle, kernels = profile_step(lambda: train_on_batches(*batches))
        if args.trace and args.variant == SOLAR:
            profile_step(lambda: train_on_batches(*batches), args.trace)
        result |= {"idle": idle, "kernels": dict(list(kernels.items())[:LONGEST_KERNELS])}
    return result


def measure_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Return step times and memory of TRL's trainer."""
    from pipeline.benchmarks.step_trl import train_with_trl

    steps = train_with_trl(
        fields_of(args),
        deepspeed_config_of(args),
        rows=args.rows,
        tokens=args.tokens,
        sequence=args.sequence,
        micro_batches=args.micro_batches,
        steps=WARM_UP_STEPS + args.steps,
        precision=args.precision,
        checkpointing=args.activation_checkpointing,
        learning_rate=LEARNING_RATE,
    )
    return {
        "times": steps.times[WARM_UP_STEPS:],
        "processor_times": steps.processor_times[WARM_UP_STEPS:],
        "memory_gb": peak_memory_gb() - steps.memory_before_gb,
    }


def launch(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a variant on all ranks and return the measurements of rank 0."""
    flags, parent_only = ("tied", "activation_checkpointing"), ("variant", "arms", "output")
    arguments = ["-m", "pipeline.benchmarks.step", f"--arm={variant}"]
    values = {key: value for key, value in vars(args).items() if key not in (*parent_only, *flags)}
    arguments += [f"--{key}={value}" for key, value in values.items() if value is not None]
    arguments += [f"--{key}" for key in flags if getattr(args, key)]
    (measurements,) = run_ranks(args.ranks, arguments)
    return measurements


def compare(args: argparse.Namespace) -> list[Row]:
    """Run SOLAR and the variants in turn. Print, write and return a row for each, with the ratio of SOLAR to it.

    A variant that fails has no row; its error is printed.
    """
    variants = [SOLAR, *(variant for variant in args.arms if variant != SOLAR)]
    measurements: dict[str, list[dict]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in list(measurements):
            try:
                measurements[variant].append(launch(variant, args))
            except RuntimeError as error:
                if variant == SOLAR:
                    raise
                print(f"{variant}: {error}", file=sys.stderr, flush=True)
                del measurements[variant]
    rows = [row_of(variant, measurements, args) for variant in measurements]
    shown = ("arm", "step_s", "processor_s", "memory_gb", "idle", "mfu")
    for row in rows:
        print({key: value for key, value in row.items() if key in shown or key.endswith("_ratio")}, flush=True)
    for name, milliseconds in measurements[SOLAR][0].get("kernels", {}).items():
        print(f"{milliseconds:9.2f} ms  {name[:100]}")
    if args.output:
        write_csv(rows, args.output)
    return rows


def row_of(variant: str, measurements: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> Row:
    """Return the row of a variant: medians over its rounds, and the ratios of SOLAR's medians to them."""

    def median(key: str, of: str = variant) -> float:
        values = [m[key] for m in measurements[of]]
        return float(statistics.median(chain.from_iterable(values) if key.endswith("times") else values))

    row: Row = {
        "arm": variant,
        "step_s": round(median("times"), 4),
        "processor_s": round(median("processor_times"), 4),
        "memory_gb": round(median("memory_gb"), 3),
        "solar_time_ratio": round(median("times", SOLAR) / median("times"), 3),
        "solar_processor_ratio": round(median("processor_times", SOLAR) / median("processor_times"), 3),
        "solar_memory_ratio": round(median("memory_gb", SOLAR) / median("memory_gb"), 3),
    }
    gpu = torch.cuda.is_available()
    if gpu:
        tokens = args.rows * args.tokens * args.micro_batches
        targets = tokens - tokens // args.sequence * (args.sequence // 3)
        flops = training_flops(fields_of(args), tokens, targets, args.sequence)
        row["idle"], row["mfu"] = None, None
        if variant != TRL:
            row["idle"] = round(median("idle"), 3)
        if device := device_called(torch.cuda.get_device_name()):
            row["mfu"] = round(flops / median("times") / device.flops(args.precision), 3)
    return row | {
        **{k: getattr(args, k) for k in SIZES},
        "model": args.model or "",
        "precision": args.precision,
        "tied": args.tied,
        "checkpointing": args.activation_checkpointing,
        "machine": machine("cuda" if gpu else "cpu"),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
    }


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and fill in the sizes that `--model` determines."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arm", dest="variant", choices=STEP_VARIANTS, help=argparse.SUPPRESS
    )  # set in child processes
    parser.add_argument(
        "--arms", nargs="+", choices=STEP_VARIANTS, default=INSTALLED, help="default: those without other packages"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=sorted(SHAPES), help="shape of a published model, in place of sizes")
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, help="default: 4, or all layers of --model")
    parser.add_argument("--rows", type=int, default=1, help="number of packed rows per rank and step")
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens per row")
    parser.add_argument("--sequence", type=int, default=128, help="number of tokens per sequence")
    parser.add_argument("--micro_batches", type=int, default=1, help="number of micro-batches per optimizer step")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace of one more step on a GPU")
    args = parser.parse_args(arguments)
    fill_sizes(args)
    return args


def main() -> None:
    args = parse_args()
    if args.variant:
        run_variant(args)
    elif len(compare(args)) < len({SOLAR, *args.arms}):
        sys.exit(1)


if __name__ == "__main__":
    exit_cleanly(main)

"""Measure time and memory of full training steps: SOLAR, two variants of it, and plain DeepSpeed with full logits.

    python -m pipeline.benchmarks.step --ranks 2 --vocab_size 65536 --hidden_size 256 --output docs/bench/train_cpu.csv

The variants of SOLAR are alignment weight 0; attention with a mask over the row (sdpa), as in plain DeepSpeed; ZeRO-3
hooks on every module instead of whole layers; and persistent parameters gathered one by one after a step, as DeepSpeed
does. Each variant trains a randomly initialized Qwen2 on random packed rows in separate processes. Variants run in turn
for `rounds` rounds. Time is the median step time over all rounds. The processor time of a rank is more robust if the
machine is shared. Memory is the peak of a rank minus its memory after the engine has been built.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.benchmarks.common import (
    Row,
    hooks_on_every_module,
    machine,
    persistent_parameters_gathered_one_by_one,
    random_batch,
    run_ranks,
    write_csv,
)
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.config.settings import Config, ModelSettings, TrainingSettings
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossNormalizers
from pipeline.models.loading import load_model_config
from pipeline.training.metrics import peak_memory_gb

SOLAR, WEIGHT_0, MASK, MODULES, ONE_BY_ONE, PLAIN = STEP_VARIANTS = (
    *("solar", "weight 0", "mask", "modules", "one by one", "plain"),
)
SIZES = ("ranks", "vocab_size", "hidden_size", "layers", "rows", "tokens", "sequence")
LEARNING_RATE = 1e-5

TrainOnBatch = Callable[[MicroBatch, LossNormalizers], object]


def model_fields(vocab_size: int, hidden_size: int, layers: int, tied: bool) -> dict[str, Any]:
    """Return the configuration fields of the Qwen2 model that all variants train."""
    heads = max(1, hidden_size // 64)
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": tied,
    }


def build_variant(args: argparse.Namespace) -> TrainOnBatch:
    """Build the engine of `args.variant` on this rank and return its optimizer step."""
    from pipeline.zero3.ds_config import deepspeed_config

    config = Config(
        deepspeed=args.deepspeed,
        model=ModelSettings(
            config=model_fields(args.vocab_size, args.hidden_size, args.layers, args.tied),
            attn_implementation="sdpa" if args.variant in (PLAIN, MASK) else None,
            activation_checkpointing=args.activation_checkpointing,
        ),
        training=TrainingSettings(
            train_batch_size=args.rows * args.ranks, train_micro_batch_size_per_gpu=args.rows, precision=args.precision
        ),
    )
    model_config = load_model_config(config.model, 1)
    ds = deepspeed_config(config, args.ranks, args.hidden_size, max_steps=1)
    if args.variant == PLAIN:
        from pipeline.benchmarks.step_baseline import PlainEngine

        plain = PlainEngine(config, ds, model_config, LEARNING_RATE)
        return lambda batch, _: plain.step(batch, 1.0)
    return _build_solar(args, config, ds, model_config)


def _build_solar(
    args: argparse.Namespace, config: Config, ds: dict[str, Any], model_config: PreTrainedConfig
) -> TrainOnBatch:
    from pipeline.training.engine_setup import build_engine
    from pipeline.training.loop import train_step
    from pipeline.training.state import TrainState

    contexts = {ONE_BY_ONE: persistent_parameters_gathered_one_by_one, MODULES: hooks_on_every_module}
    with contexts.get(args.variant, nullcontext)():
        engine = build_engine(config, ds, model_config, args.vocab_size, 2)
    engine.set_learning_rate(LEARNING_RATE)
    weight, state = 0.0 if args.variant == WEIGHT_0 else 1.0, TrainState()
    return lambda batch, normalizers: train_step(engine, [batch], weight, normalizers, state)


def run_variant(args: argparse.Namespace) -> None:
    """Train one variant on this rank. Rank 0 prints its measurements as JSON."""
    from pipeline.zero3.process_group import start_process_group

    start_process_group()
    train_on_batch = build_variant(args)
    before, times, processor_times = memory_in_use_gb(), [], []
    for step in range(args.steps + 1):
        batch = random_batch(args.vocab_size, args.rows, args.tokens, args.sequence, step)
        local = batch.loss_batch.normalizers()
        normalizers = LossNormalizers(local.tokens * args.ranks, local.pairs * args.ranks)
        started, processor_started = time.perf_counter(), time.process_time()
        train_on_batch(batch, normalizers)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        processor_times.append(time.process_time() - processor_started)
    if distributed.is_main_process():
        # The first step is a warm-up.
        result = {"times": times[1:], "processor_times": processor_times[1:], "memory_gb": peak_memory_gb() - before}
        print(json.dumps(result), flush=True)
    distributed.shut_down()


def memory_in_use_gb() -> float:
    """Return the memory in use in GiB: allocated on the GPU, or resident on a CPU. Resets the peak on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def launch(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a variant on all ranks and return the measurements of rank 0."""
    flags, parent_only = ("tied", "activation_checkpointing"), ("variant", "arms", "output")
    arguments = ["-m", "pipeline.benchmarks.step", f"--arm={variant}"]
    arguments += [f"--{key}={value}" for key, value in vars(args).items() if key not in (*parent_only, *flags)]
    arguments += [f"--{key}" for key in flags if getattr(args, key)]
    (measurements,) = run_ranks(args.ranks, arguments)
    return measurements


def compare(args: argparse.Namespace) -> None:
    """Run SOLAR and the variants in turn. Print and write one row for each, with the ratio of SOLAR to it."""
    variants = [SOLAR, *(variant for variant in args.arms if variant != SOLAR)]
    measurements: dict[str, list[dict]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            measurements[variant].append(launch(variant, args))
    seconds = {v: statistics.median(t for m in measurements[v] for t in m["times"]) for v in variants}
    processor = {v: statistics.median(t for m in measurements[v] for t in m["processor_times"]) for v in variants}
    memory = {v: statistics.median(m["memory_gb"] for m in measurements[v]) for v in variants}
    rows: list[Row] = [
        {
            "arm": variant,
            "step_s": round(seconds[variant], 4),
            "processor_s": round(processor[variant], 4),
            "memory_gb": round(memory[variant], 3),
            "solar_time_ratio": round(seconds[SOLAR] / seconds[variant], 3),
            "solar_processor_ratio": round(processor[SOLAR] / processor[variant], 3),
            "solar_memory_ratio": round(memory[SOLAR] / memory[variant], 3),
            **{k: getattr(args, k) for k in SIZES},
            "precision": args.precision,
            "tied": args.tied,
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "transformers": version("transformers"),
        }
        for variant in variants
    ]
    for row in rows:
        print({key: value for key, value in row.items() if key == "arm" or key.endswith(("_s", "_gb", "_ratio"))})
    if args.output:
        write_csv(rows, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arm", dest="variant", choices=STEP_VARIANTS, help=argparse.SUPPRESS
    )  # set in child processes
    parser.add_argument(
        "--arms", nargs="+", choices=STEP_VARIANTS, default=STEP_VARIANTS, help="variants to compare SOLAR with"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1, help="number of packed rows per rank and step")
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens per row")
    parser.add_argument("--sequence", type=int, default=128, help="number of tokens per sequence")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()
    if args.variant:
        run_variant(args)
    else:
        compare(args)


if __name__ == "__main__":
    exit_cleanly(main)

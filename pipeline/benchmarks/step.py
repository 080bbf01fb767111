"""Step time and memory of whole training steps: SOLAR, two variants of it, and plain DeepSpeed with full logits.

    python -m pipeline.benchmarks.step --ranks 2 --vocab_size 65536 --hidden_size 256 --output docs/bench/train_cpu.csv

The variants: weight 0; persistent parameters gathered one by one after a step, as DeepSpeed does it. Each arm trains a
fresh Qwen2 on random packed rows in processes of its own; arms take turns for `rounds` rounds. Time is the median step
of all rounds; memory is the peak of a rank beyond what it held when its engine was ready.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.common import random_batch, run_ranks
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.config.settings import Config, ModelSettings, TrainingSettings
from pipeline.training.metrics import peak_memory_gb

ARMS = ("solar", "weight 0", "one by one", "plain")


def model_fields(vocab_size: int, hidden_size: int, layers: int, tied: bool) -> dict[str, Any]:
    """The Qwen2 that the arms train."""
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


def run_arm(args: argparse.Namespace) -> None:
    """One arm on this rank; rank 0 prints its figures as JSON."""
    from pipeline.loss import LossNormalizers
    from pipeline.models.loading import DTYPES, load_model, load_model_config
    from pipeline.training.loop import train_step
    from pipeline.training.state import TrainState
    from pipeline.zero3.ds_config import deepspeed_config
    from pipeline.zero3.engine import ZeroEngine, build_sharded, start_process_group

    start_process_group()
    config = Config(
        deepspeed=args.deepspeed,
        model=ModelSettings(
            config=model_fields(args.vocab_size, args.hidden_size, args.layers, args.tied),
            activation_checkpointing=args.activation_checkpointing,
        ),
        training=TrainingSettings(
            train_batch_size=args.rows * args.ranks, train_micro_batch_size_per_gpu=args.rows, precision=args.precision
        ),
    )
    ds = deepspeed_config(config, args.ranks)
    model_config = load_model_config(config.model, 1)
    model = build_sharded(ds, lambda: load_model(config.model, model_config, DTYPES[args.precision]))
    weight = 0.0 if args.arm == "weight 0" else 1.0
    if args.arm == "plain":
        from pipeline.benchmarks.step_baseline import PlainEngine

        plain = PlainEngine(ds, model, 1e-5)
    else:
        zero = ZeroEngine(config, ds, model, args.vocab_size, 2, gather_together=args.arm != "one by one")
        zero.set_learning_rate(1e-5)
    before, times, state = held_memory_gb(), [], TrainState()
    for step in range(args.steps + 1):
        batch = random_batch(args.vocab_size, args.rows, args.tokens, args.sequence, step)
        normalizers = batch.loss_batch.normalizers()
        started = time.perf_counter()
        if args.arm == "plain":
            plain.step(batch, weight)
        else:
            train_step(
                zero,
                [batch],
                weight,
                LossNormalizers(normalizers.tokens * args.ranks, normalizers.pairs * args.ranks),
                state,
            )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    if distributed.is_main_process():
        print(json.dumps({"times": times[1:], "memory_gb": peak_memory_gb() - before}), flush=True)
    distributed.shut_down()


def held_memory_gb() -> float:
    """Allocated on the GPU, or resident, now; the peak is counted from here on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def launch(arm: str, args: argparse.Namespace) -> dict:
    """All ranks of an arm; the figures of rank 0."""
    words = [f"--{key}={value}" for key, value in vars(args).items() if key not in ("arm", "tied", "output")]
    words = [word for word in words if "activation_checkpointing" not in word]
    flags = [f"--{key}" for key in ("tied", "activation_checkpointing") if getattr(args, key)]
    return json.loads(run_ranks(args.ranks, ["-m", "pipeline.benchmarks.step", f"--arm={arm}", *words, *flags])[-1])


def compare(args: argparse.Namespace) -> None:
    """All arms in turn; prints and writes one row each, with the ratio of ours to it."""
    figures: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            figures[arm].append(launch(arm, args))
    seconds = {arm: statistics.median(t for f in figures[arm] for t in f["times"]) for arm in ARMS}
    memory = {arm: statistics.median(f["memory_gb"] for f in figures[arm]) for arm in ARMS}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    rows = [
        {
            "arm": arm,
            "step_s": round(seconds[arm], 4),
            "memory_gb": round(memory[arm], 3),
            "solar_time_ratio": round(seconds["solar"] / seconds[arm], 3),
            "solar_memory_ratio": round(memory["solar"] / memory[arm], 3),
            **{k: getattr(args, k) for k in ("ranks", "vocab_size", "hidden_size", "layers", "rows", "tokens")},
            "precision": args.precision,
            "tied": args.tied,
            "machine": machine,
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "transformers": version("transformers"),
        }
        for arm in ARMS
    ]
    for row in rows:
        print({k: row[k] for k in ("arm", "step_s", "memory_gb", "solar_time_ratio", "solar_memory_ratio")})
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.benchmarks.step", description=__doc__)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1, help="packed rows of each rank and step")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of each sequence in a row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="CSV to write")
    args = parser.parse_args()
    if args.arm:
        run_arm(args)
    else:
        compare(args)


if __name__ == "__main__":
    exit_cleanly(main)

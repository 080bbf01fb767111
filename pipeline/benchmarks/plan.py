"""Bytes, memory and time of real training steps next to what the plan says of them: rows to CSV.

    python -m pipeline.benchmarks.plan

Tiny models of several shapes train under ZeRO-3 on 1, 2, 4 and 8 CPU ranks of this machine. Bytes are counted at
every collective; memory is the sum of all storages alive, looked at after every operation, at its highest: what an
operation allocates within itself and frees again is not in it. Time is the clock's, a median of steps, so the
machine must be quiet; the rates of a matrix product and of a pass over memory are measured alone before, and two
constants, the host's time for a module and for a hop, are fitted on all rows together.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pipeline.benchmarks.calibrate import beside, calibrate, probe
from pipeline.benchmarks.common import random_batch, run_ranks
from pipeline.benchmarks.loss import ROOT, machine, write
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.config.settings import Config, ModelSettings, TrainingSettings
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossNormalizers, LossSettings
from pipeline.loss.settings import Head
from pipeline.models.loading import DTYPES, load_model, load_model_config
from pipeline.plan import memory, traffic
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import Live, model_facts
from pipeline.plan.workload import Run, Workload

if TYPE_CHECKING:
    from pipeline.zero3.engine import ZeroEngine

RANKS = (1, 2, 4, 8)
WIDTH, SEQUENCE, STEPS, TIMED = 256, 32, 3, 7


@dataclass(frozen=True)
class Case:
    """A model and settings; the zeros of a DeepSpeed file are small so that parameters do come and go."""

    name: str
    model_type: str = "qwen2"
    vocab: int = 8192
    hidden: int = 128
    layers: int = 4
    rows: int = 1
    accumulation: int = 1
    tied: bool = True
    checkpointing: bool = False
    precision: Literal["bf16", "fp32"] = "fp32"
    head: Head = "vocab_parallel"
    attention: Literal["sdpa", "eager"] = "sdpa"
    bucket: int = 300_000
    live: int = 1_000_000
    budget_mb: float | None = None

    def config(self, ranks: int) -> Config:
        heads = self.hidden // 32
        fields = {
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "head_dim": 32,
            "tie_word_embeddings": self.tied,
            "pad_token_id": None,
        }
        return Config(
            model=ModelSettings(
                config=fields, attn_implementation=self.attention, activation_checkpointing=self.checkpointing
            ),
            loss=LossSettings(head=self.head, memory_budget_mb=self.budget_mb),
            training=TrainingSettings(
                train_batch_size=self.rows * self.accumulation * ranks,
                train_micro_batch_size_per_gpu=self.rows,
                precision=self.precision,
            ),
        )

    def deepspeed(self) -> dict[str, Any]:
        return {
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": self.bucket,
                "stage3_prefetch_bucket_size": self.bucket,
                "stage3_max_live_parameters": self.live,
                "stage3_max_reuse_distance": self.live,
                "stage3_param_persistence_threshold": 1000,
            },
            "steps_per_print": 10**9,
        }


CASES = (
    Case("tied"),
    Case("untied", tied=False),
    Case("checkpointed", checkpointing=True, layers=8, rows=4),
    Case("gathered", head="gathered", rows=2),
    Case("bf16", precision="bf16"),
    Case("accumulated", accumulation=3),
    Case("all kept", live=1_000_000_000, bucket=50_000_000),
    Case("wide", model_type="llama", hidden=256, vocab=4096, rows=2),
    Case("long", rows=8, layers=6, vocab=2048),
    Case("eager", attention="eager", rows=2),
    Case("chunked", vocab=32768, rows=4, budget_mb=8),
    Case("cut", vocab=32768, layers=2, rows=2, budget_mb=1),
    Case("qwen3", model_type="qwen3", layers=6, hidden=192),
)


def batch_of(case: Case, step: int) -> MicroBatch:
    return random_batch(case.vocab, case.rows, WIDTH, SEQUENCE, step)


def workload() -> Workload:
    target_tokens = int((np.arange(WIDTH) % SEQUENCE >= SEQUENCE // 3).sum())
    count = WIDTH // SEQUENCE
    return Workload(WIDTH, WIDTH, target_tokens, count, count / 2, 1000)


def planned(case: Case, ranks: int) -> Run:
    config = case.config(ranks)
    facts = model_facts(load_model_config(config.model, 1))
    return Run(config, facts, ZeroSettings.read(case.deepspeed()), workload(), ranks, gpu=False, mask_copies=True)


def measure(case: Case, ranks: int) -> dict[str, float]:
    """On this rank: bytes and collectives of a step, bytes alive after and at most in it, a median step's seconds."""
    from pipeline.benchmarks.ranks import Watch
    from pipeline.training.loop import train_step
    from pipeline.training.state import TrainState

    gc.collect()
    times = []
    with Live() as live:
        zero = engine(case)
        for step in range(STEPS):
            batches, normalizers = window(case, step)
            live.peak = 0
            with Watch(distributed.rank(), ranks) as watch:
                distributed.all_reduce_sum([normalizers.tokens, normalizers.pairs], zero.device)
                train_step(zero, batches, 1.0, normalizers, TrainState(step))
        after = live.now()
    for step in range(TIMED):
        batches, normalizers = window(case, step)
        distributed.all_reduce_sum([0.0], zero.device)  # all begin together
        started = time.perf_counter()
        distributed.all_reduce_sum([normalizers.tokens, normalizers.pairs], zero.device)
        train_step(zero, batches, 1.0, normalizers, TrainState(step))
        times.append(time.perf_counter() - started)
    zero.engine.destroy()
    counted = {"bytes": watch.received, "calls": watch.calls, "after": after, "peak": live.peak}
    return counted | {"step_s": statistics.median(times)}


def window(case: Case, step: int) -> tuple[list[MicroBatch], LossNormalizers]:
    """This rank's micro-batches of a step, and the totals of all ranks, whose batches have the same numbers."""
    ranks = distributed.world_size()
    batches = [batch_of(case, step * case.accumulation + m) for m in range(case.accumulation)]
    mine = [batch.loss_batch.normalizers() for batch in batches]
    return batches, LossNormalizers(sum(t.tokens for t in mine) * ranks, sum(t.pairs for t in mine) * ranks)


def engine(case: Case, gather_together: bool = True) -> "ZeroEngine":
    """A fresh model of the case under ZeRO-3 on this process's ranks."""
    from pipeline.zero3.engine import ZeroEngine, build_sharded

    config = case.config(distributed.world_size())
    ds = case.deepspeed() | {
        "train_batch_size": config.training.train_batch_size,
        "train_micro_batch_size_per_gpu": case.rows,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if case.precision == "bf16":
        ds["bf16"] = {"enabled": True}
    model_config = load_model_config(config.model, 1)
    model = build_sharded(ds, lambda: load_model(config.model, model_config, DTYPES[case.precision]))
    zero = ZeroEngine(config, ds, model, case.vocab, 2, gather_together=gather_together)
    zero.set_learning_rate(1e-5)
    return zero


def run_rank(names: list[str]) -> None:
    from pipeline.zero3.engine import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    figures = probe()
    if distributed.is_main_process():
        print(json.dumps({"case": None, **figures}), flush=True)
    for case in CASES:
        if case.name in names:
            figures = measure(case, distributed.world_size())
            if distributed.is_main_process():
                print(json.dumps({"case": case.name, **figures}), flush=True)
    distributed.shut_down()


def launch(ranks: int, names: list[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """All cases on that many ranks; rank 0's probe and figures."""
    lines = run_ranks(ranks, ["-m", "pipeline.benchmarks.plan", "--rank_of", str(ranks), "--cases", *names])
    found = [json.loads(line) for line in lines if line.startswith('{"case"')]
    return found[0], found[1:]


def row(case: Case, ranks: int, figures: dict[str, Any]) -> dict[str, Any]:
    """Planned beside measured."""
    run = planned(case, ranks)
    plan = memory.memory(run)
    found = traffic.transfers(run)
    pairs = {
        "received_mb": (sum(t.received for t in found) / 1e6, figures["bytes"] / 1e6),
        "calls": (sum(t.calls for t in found), figures["calls"] if ranks > 1 else 0),
        "states_mb": (plan.resident / 1e6, figures["after"] / 1e6),
        "peak_mb": (plan.peak / 1e6, figures["peak"] / 1e6),
    }
    result: dict[str, Any] = {"case": case.name, "ranks": ranks}
    for name, (expected, measured) in pairs.items():
        result |= beside(name, expected, measured, 3)
    return result | {"phase": plan.peak_phase, "head": run.head, "step_s": figures["step_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "plan.csv")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES], help="a part of the grid")
    parser.add_argument("--rank_of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.cases)
        return
    rows, probed = [], {}
    for ranks in args.ranks:
        probed[ranks], found = launch(ranks, args.cases)
        for figures in found:
            case = next(case for case in CASES if case.name == figures["case"])
            rows.append(row(case, ranks, figures) | {"machine": machine("cpu"), "torch": torch.__version__})
            print("  ".join(f"{key}={value}" for key, value in list(rows[-1].items())[:-2]), flush=True)
    runs = [planned(next(c for c in CASES if c.name == row["case"]), row["ranks"]) for row in rows]
    calibrate(rows, runs, probed)
    write(rows, args.out)


if __name__ == "__main__":
    exit_cleanly(main)

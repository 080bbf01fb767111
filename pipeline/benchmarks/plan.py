"""Compare the bytes, memory and time of real training steps with the planner's prediction. Writes a CSV.

    python -m pipeline.benchmarks.plan

Tiny models of several shapes train with ZeRO-3 on 1, 2, 4 and 8 CPU ranks of this machine. Bytes are counted at every
collective. Memory is the peak of all live storages after each operation, so temporary allocations within an operation
are not included. Time is the median wall-clock time of a step, so the machine must be idle. Matmul throughput and
memory bandwidth are measured after each timed step, because the speed of a shared machine changes within minutes. Then
the host time per module and the time per hop are fitted to all rows together.
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

from pipeline.benchmarks.calibrate import calibrate, probe, with_error
from pipeline.benchmarks.common import OUTPUT, Row, machine, print_row, random_batch, run_ranks, write_csv
from pipeline.benchmarks.ranks import CollectiveCounter
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.config.settings import AdapterSettings, Config, ModelSettings, TrainingSettings
from pipeline.data.micro_batch import MicroBatch, local_normalizers
from pipeline.loss import LossNormalizers, LossSettings
from pipeline.loss.settings import Head
from pipeline.models.loading import load_model_config
from pipeline.plan.activations import NO_ADAPTER
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.memory import estimate_memory
from pipeline.plan.model_facts import model_stats
from pipeline.plan.storage_tracker import StorageTracker
from pipeline.plan.traffic import estimate_transfers
from pipeline.plan.workload import PlannedRun, Workload

if TYPE_CHECKING:
    from pipeline.zero3.engine import ZeroEngine

RANKS = (1, 2, 4, 8)
COUNTED_STEPS, TIMED_STEPS = 3, 7


@dataclass(frozen=True)
class Case:
    """A tiny model and its settings.

    Attributes:
        bucket: size of DeepSpeed's reduce and prefetch buckets, in elements. Both `bucket` and `live` are so small that
            parameters are gathered and released.
        live: DeepSpeed's maximum of live parameters, in elements.
        shared: whether up to four ranks, as many as the model has heads, share each row.
        hpz: number of ranks of a node of hpZ.
    """

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
    attention: Literal["solar_packed", "eager"] = "solar_packed"
    bucket: int = 300_000
    live: int = 1_000_000
    budget_mb: float | None = None
    adapter: AdapterSettings = NO_ADAPTER
    row_tokens: int = 256
    sequence_length: int = 32
    shared: bool = False
    hpz: int = 1

    def parts(self, ranks: int) -> int:
        """Return the number of ranks that share a row."""
        return min(ranks, 4) if self.shared else 1

    def config(self, ranks: int) -> Config:
        """Return the recipe of the case for a number of ranks."""
        fields = {
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 32,
            "num_key_value_heads": max(1, self.hidden // 64),
            "head_dim": 32,
            "tie_word_embeddings": self.tied,
            "pad_token_id": None,
        }
        attention, checkpointing = self.attention, self.checkpointing
        model = ModelSettings(None, fields, attention, activation_checkpointing=checkpointing, adapter=self.adapter)
        return Config(
            model=model,
            loss=LossSettings(head=self.head, memory_budget_mb=self.budget_mb),
            training=TrainingSettings(
                train_batch_size=self.rows * self.accumulation * ranks // self.parts(ranks),
                train_micro_batch_size_per_gpu=self.rows,
                sequence_parallel_size=self.parts(ranks),
                precision=self.precision,
            ),
        )

    def deepspeed(self, ranks: int) -> dict[str, Any]:
        """Return the complete DeepSpeed configuration of the case for a number of ranks."""
        ds: dict[str, Any] = {
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": self.bucket,
                "stage3_prefetch_bucket_size": self.bucket,
                "stage3_max_live_parameters": self.live,
                "stage3_max_reuse_distance": self.live,
                "stage3_param_persistence_threshold": 1000,
                "zero_hpz_partition_size": min(self.hpz, ranks),
                "memory_efficient_linear": not self.checkpointing and ranks > 1,
            },
            "steps_per_print": 10**9,
            "train_batch_size": self.rows * self.accumulation * ranks // self.parts(ranks),
            "sequence_parallel_size": self.parts(ranks),
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 1.0,
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        return ds | ({"bf16": {"enabled": True}} if self.precision == "bf16" else {})


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
    Case("lora", tied=False, rows=2, adapter=AdapterSettings(r=16)),
    Case("dora with embeddings", layers=6, adapter=AdapterSettings(r=8, use_dora=True, train_embeddings=True)),
    Case("shared row", vocab=2048, layers=2, row_tokens=16384, sequence_length=512, shared=True, budget_mb=4),
    Case("nodes of two", tied=False, rows=2, accumulation=2, hpz=2),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def planned_run(case: Case, ranks: int) -> PlannedRun:
    """Return the planner's input for a case and a number of ranks."""
    config, zero = case.config(ranks), ZeroSettings.from_config(case.deepspeed(ranks))
    stats = model_stats(load_model_config(config.model, 1), case.adapter)
    tokens, length = case.row_tokens, case.sequence_length
    target_tokens = int((np.arange(tokens) % length >= length // 3).sum())
    workload = Workload(tokens, tokens, target_tokens, tokens // length, tokens // length / 2, 1000)
    return PlannedRun(config, stats, zero, workload, ranks, gpu=False, mask_copies=True)


def build_case_engine(case: Case) -> "ZeroEngine":
    """Build the ZeRO-3 engine of a case, with random weights, on all ranks of the process group."""
    from pipeline.training.engine_setup import build_engine

    config, ds = case.config(distributed.world_size()), case.deepspeed(distributed.world_size())
    engine = build_engine(config, ds, load_model_config(config.model, 1), case.vocab, 2)
    engine.set_learning_rate(1e-5)
    return engine


def random_micro_batches(case: Case, step: int) -> tuple[list[MicroBatch], LossNormalizers]:
    """Return this rank's micro-batches of a step, and the normalizers over all ranks."""
    parts, steps = case.parts(distributed.world_size()), range(step * case.accumulation, (step + 1) * case.accumulation)
    batches = [random_batch(case.vocab, case.rows, case.row_tokens, case.sequence_length, m, parts) for m in steps]
    local = local_normalizers(batches)
    return batches, LossNormalizers(*distributed.all_reduce_sum([local.tokens, local.pairs], torch.device("cpu")))


def measure_case(case: Case, timed_steps: int) -> dict[str, Any]:
    """Measure a step on this rank.

    Args:
        case: model and settings.
        timed_steps: steps to time after those whose bytes are counted; 0 measures no time.

    Returns:
        Received bytes (mean over ranks), number of collectives, live bytes after a step and at its peak, and `timings`,
        the medians of the seconds of a step and of the rates of `probe` (None without timed steps).
    """
    from pipeline.training.loop import train_step
    from pipeline.training.state import TrainState

    gc.collect()
    timings = []
    with StorageTracker() as tracker:
        engine = build_case_engine(case)
        for step in range(COUNTED_STEPS):
            batches, normalizers = random_micro_batches(case, step)
            tracker.peak = 0
            with CollectiveCounter() as counter:
                distributed.all_reduce_sum([normalizers.tokens, normalizers.pairs], engine.device)
                train_step(engine, batches, 1.0, normalizers, TrainState(step))
        after = tracker.live_bytes()
    for step in range(timed_steps):
        batches, normalizers = random_micro_batches(case, step)
        distributed.all_reduce_sum([0.0], engine.device)  # so that all ranks start together
        started = time.perf_counter()
        distributed.all_reduce_sum([normalizers.tokens, normalizers.pairs], engine.device)
        train_step(engine, batches, 1.0, normalizers, TrainState(step))
        timings.append({"step_s": time.perf_counter() - started, **probe()})
    engine.ds_engine.destroy()
    return {
        "bytes": distributed.all_reduce_sum([counter.received], engine.device)[0] / distributed.world_size(),
        "calls": counter.calls,
        "states": after,
        "peak": tracker.peak,
        "timings": {
            name: statistics.median(timing[name] for timing in timings) if timings else None
            for name in ("step_s", "core_gflops", "core_gb_s")
        },
    }


def run_rank(names: list[str], timed_steps: int) -> None:
    """Measure the named cases on this rank. Rank 0 prints a JSON line for each case."""
    from pipeline.zero3.process_group import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    for case in CASES:
        if case.name in names:
            # `probe` measures fp32 products. Without instructions for bf16, those in bf16 are slow.
            measurements = measure_case(case, timed_steps if case.precision == "fp32" else 0)
            if distributed.is_main_process():
                print(json.dumps({"case": case.name, **measurements}), flush=True)
    distributed.shut_down()


def launch(ranks: int, names: list[str], timed_steps: int = TIMED_STEPS) -> list[dict[str, Any]]:
    """Run the named cases on `ranks` ranks. Return rank 0's measurements of each case."""
    options = ["--rank_of", str(ranks), "--cases", *names, "--timed_steps", str(timed_steps)]
    return run_ranks(ranks, ["-m", "pipeline.benchmarks.plan", *options])


def compare(case: Case, ranks: int, measurements: dict[str, Any]) -> Row:
    """Return a CSV row with the measurements and the prediction."""
    run = planned_run(case, ranks)
    memory, transfers = estimate_memory(run), estimate_transfers(run)
    pairs = {
        "received_mb": (sum(t.received for t in transfers) / 1e6, measurements["bytes"] / 1e6),
        "calls": (sum(t.calls for t in transfers), measurements["calls"] if ranks > 1 else 0),
        "states_mb": (memory.resident / 1e6, measurements["states"] / 1e6),
        "peak_mb": (memory.peak / 1e6, measurements["peak"] / 1e6),
    }
    row: Row = {"case": case.name, "ranks": ranks}
    for name, (predicted, measured) in pairs.items():
        row |= with_error(name, predicted, measured, 3)
    return row | {"phase": memory.peak_phase, "head": run.head, **measurements["timings"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT / "plan.csv", help="CSV file to write")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES], help="cases to run")
    parser.add_argument("--rank_of", type=int, help=argparse.SUPPRESS)  # set in child processes
    parser.add_argument("--timed_steps", type=int, default=TIMED_STEPS, help=argparse.SUPPRESS)  # likewise
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.cases, args.timed_steps)
        return
    rows = []
    for ranks in args.ranks:
        for measurements in launch(ranks, args.cases):
            row = compare(case_named(measurements["case"]), ranks, measurements)
            print_row(row, len(row))
            rows.append(row | {"machine": machine("cpu"), "torch": torch.__version__})
    calibrate(rows, [planned_run(case_named(row["case"]), row["ranks"]) for row in rows])
    write_csv(rows, args.out)


if __name__ == "__main__":
    exit_cleanly(main)

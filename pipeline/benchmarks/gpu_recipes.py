"""Compare the memory and the step time of recipes on one GPU with the planner's prediction. Writes a CSV.

    python -m pipeline.benchmarks.gpu_recipes

Each case trains the shape of a published model from random weights on random packed rows, in a process of its own. Time
is the median of the timed steps. Memory is the peak that torch has allocated since the start of the process; `reserved`
is what its allocator held at that point, without the CUDA context.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.calibrate import with_error
from pipeline.benchmarks.common import OUTPUT, ROOT, Row, machine, print_row, random_batch, run_ranks, write_csv
from pipeline.benchmarks.scale import published_models
from pipeline.common import distributed
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.hardware import device_called
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.data.micro_batch import local_normalizers
from pipeline.models.loading import load_model_config, padded_vocab_size
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import model_stats
from pipeline.plan.prediction import GIB, Cluster, Prediction
from pipeline.plan.workload import PlannedRun, Workload

SEQUENCE = 256  # tokens
WARM_UP_STEPS, TIMED_STEPS = 1, 3
OFFLOAD = ("--deepspeed", "ds_configs/zero3_offload.json")
LORA = ("--model.adapter.r", "16")


@dataclass(frozen=True)
class Case:
    """A recipe on one GPU.

    Attributes:
        model: a model of published.yaml.
        recipe: name of a file in pipeline/recipes, without `.yaml`.
        row_tokens: tokens of a packed row.
        micro_batches: rows per optimizer step.
        layers: number of decoder layers; None for all.
        overrides: settings that differ from the recipe, as on the command line.
    """

    name: str
    model: str
    recipe: str
    row_tokens: int = 8192
    micro_batches: int = 4
    layers: int | None = None
    overrides: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        """The recipe, with the model's shape in place of its path."""
        fields = dict(published_models()[self.model])
        if self.layers is not None:
            fields["num_hidden_layers"] = self.layers
        recipe = ROOT / "pipeline" / "recipes" / f"{self.recipe}.yaml"
        config = load_config(recipe, ["--training.train_batch_size", str(self.micro_batches), *self.overrides])
        return replace(config, model=replace(config.model, path=None, config=fields))


CASES = (
    Case("qwen3-0.6b", "Qwen3-0.6B", "qwen3-0.6b"),
    Case("qwen3-0.6b, offloaded", "Qwen3-0.6B", "qwen3-0.6b", overrides=OFFLOAD),
    Case("qwen3-8b, 4 layers", "Qwen3-8B", "qwen3-8b", layers=4),
    Case("qwen3-8b, LoRA of rank 16", "Qwen3-8B", "qwen3-8b", row_tokens=4096, overrides=LORA),
)


def build(case: Case) -> tuple[Config, Any, dict[str, Any]]:
    """Return the recipe, the model's configuration and the DeepSpeed configuration of a case."""
    from pipeline.zero3.ds_config import deepspeed_config

    config = case.config
    model_config = load_model_config(config.model, 1)
    model_config.vocab_size = padded_vocab_size(model_config.vocab_size, config.model.vocab_multiple)
    return config, model_config, deepspeed_config(config, 1, model_config.hidden_size, max_steps=1)


def predict(case: Case) -> Prediction:
    """Predict a case on this GPU.

    Raises:
        UserError: the planner does not know the GPU.
    """
    device = device_called(torch.cuda.get_device_name())
    if device is None:
        raise UserError(f"{torch.cuda.get_device_name()}: unknown to the planner; see pipeline/common/hardware")
    config, model_config, ds = build(case)
    sequences = case.row_tokens // SEQUENCE
    targets = sequences * (SEQUENCE - SEQUENCE // 3)
    workload = Workload(case.row_tokens, case.row_tokens, targets, sequences, sequences / 2, 1000)
    stats = model_stats(model_config, config.model.adapter)
    copies = device.attention_copies_mask
    return Prediction(
        PlannedRun(config, stats, ZeroSettings.from_config(ds), workload, 1, mask_copies=copies), Cluster(1, 1, device)
    )


def measure(case: Case) -> dict[str, float]:
    """Train a few steps. Return the median seconds of a step, and the peak of allocated and reserved bytes."""
    from pipeline.training.engine_setup import build_engine
    from pipeline.training.loop import train_step
    from pipeline.training.state import TrainState
    from pipeline.zero3.process_group import start_process_group

    start_process_group()
    config, model_config, ds = build(case)
    engine = build_engine(config, ds, model_config, model_config.vocab_size, 2)
    engine.set_learning_rate(1e-5)
    times, state = [], TrainState()
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        numbers = range(step * case.micro_batches, (step + 1) * case.micro_batches)
        batches = [random_batch(model_config.vocab_size, 1, case.row_tokens, SEQUENCE, n) for n in numbers]
        torch.cuda.synchronize()
        started = time.perf_counter()
        train_step(engine, batches, 1.0, local_normalizers(batches), state)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {
        "step_s": statistics.median(times[WARM_UP_STEPS:]),
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def compare(case: Case) -> Row:
    """Measure a case in a process of its own. Return a CSV row with the measurements and the prediction."""
    (measured,) = run_ranks(1, ["-m", "pipeline.benchmarks.gpu_recipes", "--measure", case.name])
    predicted = predict(case)
    return {
        "case": case.name,
        **with_error("memory_gib", predicted.memory.peak / GIB, measured["allocated"] / GIB, 2),
        "reserved_gib": round(measured["reserved"] / GIB, 2),
        **with_error("step_s", predicted.time.overlapped, measured["step_s"], 3),
        "model": case.model,
        "layers": case.layers or "",
        "row_tokens": case.row_tokens,
        "micro_batches": case.micro_batches,
        "overrides": " ".join(case.overrides),
        "machine": machine("cuda"),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
    }


def main() -> None:
    """Measure the selected cases and write the CSV after each."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.benchmarks.gpu_recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=OUTPUT / "gpu_recipes.csv", help="CSV file to write")
    parser.add_argument("--measure", choices=names, help=argparse.SUPPRESS)  # set in child processes
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to torch; the comparison needs one")
    if args.measure:
        print(json.dumps(measure(next(case for case in CASES if case.name == args.measure))), flush=True)
        distributed.shut_down()
        return
    rows: list[Row] = []
    for case in CASES:
        if case.name in args.cases:
            rows.append(compare(case))
            print_row(rows[-1], 8)
            write_csv(rows, args.output)


if __name__ == "__main__":
    exit_cleanly(main)

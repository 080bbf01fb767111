"""Check what only a GPU can show: kernels, speed of loss and steps, training, the planner. One line per check.

    python -m pipeline.benchmarks.gpu_checks --output docs/bench

A line begins with `passed`, `short` (a goal of the project is not reached; the line says by how much) or
`FAILED`. The exit status is 1 if a check failed. The rows of the benchmarks are written to `--output`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from pipeline.benchmarks import gpu_recipes
from pipeline.benchmarks.common import ROOT, Row, write_csv
from pipeline.benchmarks.gpu_profile import profile_step
from pipeline.benchmarks.gpu_training import Result, check_options, check_ranks, check_training
from pipeline.benchmarks.loss import MeasurementSettings, measure_variants
from pipeline.benchmarks.loss_baselines import LossInputs, LossShape, loss_variants
from pipeline.benchmarks.step import compare, parse_args
from pipeline.benchmarks.step_variants import LIGER, MASK, SOLAR, TRL, WEIGHT_0
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.loss import LossSettings

# Goals of the project on one GPU of the H100 class.
IDLE, MFU, ALIGNMENT, SPEED_OVER_TRL = 0.10, 0.45, 1.03, 1.3
LOSS_OVER_CE = 1.05
LOSS_SHAPE = LossShape(tokens=8192, vocab=131072, hidden=4096)
LOSS_VARIANTS = "solar", "solar CE", "three products"
MEMORY_ERROR, TIME_ERROR = 0.10, 0.25  # of the planner
TESTED = "checkpoint", "loss", "models", "zero3"  # packages with tests that need a GPU


def check_kernels(_: Path | None) -> Iterator[Result]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command += [f"tests/pipeline/{package}" for package in TESTED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = (result.stdout.splitlines() or [result.stderr[-200:]])[-1]
    yield ("passed" if result.returncode == 0 else "FAILED"), "; ".join([summary, *lines])


def check_loss(output: Path | None) -> Iterator[Result]:
    """Compare the loss with and without alignment, and name the kernels that alignment adds."""
    variants = loss_variants("cuda")
    settings = MeasurementSettings(torch.bfloat16, "cuda", LossSettings(), 9, time.perf_counter, [*LOSS_VARIANTS])
    rows = measure_variants(LOSS_SHAPE, settings)
    if output:
        write_csv(rows, output / "loss_gpu.csv")
    with_alignment, ce_only = ({row["contestant"]: row["ms"] for row in rows}[name] for name in LOSS_VARIANTS[:2])
    ratio = with_alignment / ce_only
    yield (
        ("passed" if ratio <= LOSS_OVER_CE else "short"),
        (f"loss: {with_alignment:.1f} ms, {ratio:.3f} x cross entropy alone (goal: {LOSS_OVER_CE})"),
    )
    inputs = LossInputs.random(LOSS_SHAPE, torch.bfloat16, "cuda", LossSettings())
    profiles = [profile_step(partial(variants[name], inputs))[1] for name in LOSS_VARIANTS[:2]]
    busy = [sum(profile.values()) for profile in profiles]
    yield "passed", f"loss: kernels of one call {busy[0]:.1f} ms, {busy[0] / busy[1]:.3f} x cross entropy alone"
    added = {name: ms - profiles[1].get(name, 0.0) for name, ms in profiles[0].items()}
    longest = sorted(added.items(), key=lambda item: -item[1])[:8]
    yield "passed", "kernels that alignment adds, ms: " + "; ".join(f"{ms:.2f} {name[:60]}" for name, ms in longest)


def check_steps(output: Path | None) -> Iterator[Result]:
    """Compare whole steps with TRL, and their idle time and MFU with the goals."""
    shapes = {
        "qwen2.5-7b, 4 layers, 8192 tokens": ["--model=qwen2.5-7b", "--layers=4", "--tokens=8192"],
        "qwen2.5-7b, 4 layers, 4096 tokens": ["--model=qwen2.5-7b", "--layers=4", "--tokens=4096"],
        "qwen2.5-0.5b, 8192 tokens": ["--model=qwen2.5-0.5b", "--tokens=8192"],
    }
    rows: list[Row] = []
    for name, shape in shapes.items():
        common = ["--ranks=1", "--sequence=1024", "--precision=bf16", "--steps=5", "--rounds=1", "--micro_batches=4"]
        variants = [SOLAR, WEIGHT_0, MASK, LIGER, TRL] if "8192" in name else [SOLAR, LIGER, TRL]
        measured = compare(parse_args([*shape, *common, "--arms", *variants]))
        rows += measured
        for missing in set(variants) - {row["arm"] for row in measured}:
            yield "FAILED", f"{name}: {missing} did not run; see its error above"
        yield from judge_steps(name, {row["arm"]: row for row in measured})
        if output:
            write_csv(rows, output / "gpu_steps.csv")


def judge_steps(name: str, rows: dict[str, Row]) -> Iterator[Result]:
    """Compare the rows of one shape with the goals."""
    solar = rows[SOLAR]
    best = min((rows[v] for v in (SOLAR, LIGER) if v in rows), key=lambda row: row["step_s"])

    def line(met: bool, text: str) -> Result:
        return ("passed" if met else "short"), f"{name}: {text}"

    yield line(best["idle"] <= IDLE, f"idle {best['idle']:.1%} of the step with {best['arm']} (goal: {IDLE:.0%})")
    if best["mfu"] is not None:
        yield line(best["mfu"] >= MFU, f"MFU {best['mfu']:.1%} with {best['arm']} (goal: {MFU:.0%})")
    if WEIGHT_0 in rows:
        ratio = solar["step_s"] / rows[WEIGHT_0]["step_s"]
        yield line(ratio <= ALIGNMENT, f"{ratio:.3f} x the step without alignment (goal: {ALIGNMENT})")
    if TRL in rows:
        ratio = rows[TRL]["step_s"] / best["step_s"]
        yield line(ratio >= SPEED_OVER_TRL, f"{ratio:.2f} x TRL's tokens per second (goal: {SPEED_OVER_TRL})")


def check_recipes(output: Path | None) -> Iterator[Result]:
    """Compare memory and step time of recipes with the planner's prediction."""
    rows: list[Row] = []
    for case in gpu_recipes.CASES:
        rows.append(row := gpu_recipes.compare(case))
        if output:
            write_csv(rows, output / "gpu_recipes.csv")
        for key, unit, limit in (("memory_gib", "GiB", MEMORY_ERROR), ("step_s", "s", TIME_ERROR)):
            status = "passed" if abs(row[f"{key}_error"]) <= limit else "short"
            yield status, f"{case.name}: {row[key]:.2f} {unit}, planned {row[f'planned_{key}']:.2f} (goal: {limit:.0%})"


CHECKS: dict[str, Callable[[Path | None], Iterator[Result]]] = {
    "kernels": check_kernels,
    "loss": check_loss,
    "steps": check_steps,
    "training": check_training,
    "options": check_options,
    "ranks": check_ranks,
    "recipes": check_recipes,
}


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.benchmarks.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--output", type=Path, help="folder for the rows of the benchmarks")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to torch; the checks need one")
    failed = False
    for name in args.checks:
        try:
            for status, text in CHECKS[name](args.output):
                print(f"{status:8} {text}", flush=True)
                failed |= status == "FAILED"
        except (RuntimeError, UserError, subprocess.CalledProcessError) as error:  # the next check may pass
            print(f"FAILED   {name}: {error}", flush=True)
            failed = True
    sys.exit(int(failed))


if __name__ == "__main__":
    exit_cleanly(main)

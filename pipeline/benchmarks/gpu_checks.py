"""Check what only a GPU can show: kernels, speed of whole steps, killed and resumed runs. One line per check.

    python -m pipeline.benchmarks.gpu_checks --output docs/bench

A line begins with `passed`, `short` (a goal of the project is not reached; the line says by how much) or
`FAILED`. The exit status is 1 if a check failed. The rows of the step benchmark are written to `--output`.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.common import ROOT, Row, write_csv
from pipeline.benchmarks.step import compare, parse_args
from pipeline.benchmarks.step_variants import LIGER, MASK, SOLAR, TRL, WEIGHT_0
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL

# Goals of the project on one GPU of the H100 class.
IDLE, MFU, ALIGNMENT, SPEED_OVER_TRL = 0.10, 0.45, 1.03, 1.3
STEPS = 8  # of the training runs
LOSS_TOLERANCE = 0.01  # relative; attention's backward adds with atomics, and bf16 rounds to 0.4 %

Result = tuple[str, str]  # status, text


def check_kernels(_: Path | None) -> Iterator[Result]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/pipeline"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = (result.stdout.splitlines() or [result.stderr[-200:]])[-1]
    yield ("passed" if result.returncode == 0 else "FAILED"), "; ".join([summary, *lines])


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


def check_training(_: Path | None) -> Iterator[Result]:
    """Train, stop by SIGUSR1, kill, resume, and train with an offloaded optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = _prepare(Path(folder))
        expected = _train(recipe, Path(folder) / "whole")
        if len(expected) != STEPS:
            yield "FAILED", f"training: {len(expected)} of {STEPS} steps logged"
            return
        run = Path(folder) / "interrupted"
        statuses = [_interrupt(recipe, run, after=2, by=signal.SIGUSR1), _interrupt(recipe, run, 5, signal.SIGKILL)]
        if statuses != [STOPPED_BY_SIGNAL, -signal.SIGKILL]:
            yield "FAILED", f"training: exit statuses {statuses} after SIGUSR1 and SIGKILL"
        yield _compare_losses("stopped by SIGUSR1, killed and resumed", _train(recipe, run), expected)
        offload = ["--deepspeed", "ds_configs/zero3_offload.json"]
        yield _compare_losses("optimizer offloaded", _train(recipe, Path(folder) / "offload", *offload), expected)


def _prepare(folder: Path) -> Path:
    """Generate and pack data, and write a recipe."""
    data, tokenizer, shards = folder / "train.jsonl", folder / "tokenizer", folder / "shards"
    for command in (
        [
            "demo",
            "--output",
            data,
            "--test_output",
            folder / "test.jsonl",
            "--train_problems",
            "60",
            "--low_resource_problems",
            "12",
            "--test_problems",
            "4",
        ],
        ["tokenizer", "--input", data, "--output", tokenizer, "--vocab_size", "600"],
        ["pack", "--input", data, "--tokenizer", tokenizer, "--output", shards, "--max_seq_length", "512"],
    ):
        subprocess.run([sys.executable, "-m", "data_prep", *map(str, command)], cwd=ROOT, check=True)
    model = {"model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
    training = {"max_steps": STEPS, "save_steps": 4, "precision": "bf16", "learning_rate": 1e-3}
    recipe: dict[str, Any] = {
        "model": {"config": model | heads},
        "data": {"shards": str(shards), "tokenizer": str(tokenizer)},
        "training": batch | training,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "recipe.yaml"


def _start(recipe: Path, run: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start training on one GPU."""
    command = [sys.executable, "pipeline/train.py", "--config", str(recipe), "--output_dir", str(run), *more]
    log = run.with_suffix(".log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def _losses(run: Path) -> dict[int, float]:
    """Return the loss of each logged step."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _train(recipe: Path, run: Path, *more: str) -> dict[int, float]:
    """Train to the end and return the loss of each step."""
    status = _start(recipe, run, *more).wait()
    if status:
        print(run.with_suffix(".log").read_text()[-2000:], flush=True)
    return _losses(run)


def _interrupt(recipe: Path, run: Path, after: int, by: signal.Signals) -> int:
    """Train, send a signal once step `after` is logged, and return the exit status."""
    process = _start(recipe, run)
    while process.poll() is None and max(_losses(run), default=0) < after:
        time.sleep(0.002)
    process.send_signal(by)
    return process.wait()


def _compare_losses(name: str, losses: dict[int, float], expected: dict[int, float]) -> Result:
    """Compare the losses of a run with those of an uninterrupted one."""
    if losses.keys() != expected.keys():
        return "FAILED", f"{name}: steps {sorted(losses)} instead of {sorted(expected)}"
    error = max(abs(losses[step] / expected[step] - 1) for step in expected)
    return ("passed" if error <= LOSS_TOLERANCE else "FAILED"), f"{name}: losses differ by at most {error:.1e}"


CHECKS: dict[str, Callable[[Path | None], Iterator[Result]]] = {
    "kernels": check_kernels,
    "steps": check_steps,
    "training": check_training,
}


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.benchmarks.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--output", type=Path, help="folder for the rows of the step benchmark")
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

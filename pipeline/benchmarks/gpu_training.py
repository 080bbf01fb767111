"""Checks of training runs on GPUs: stopped, killed and resumed; offloaded; each option against a CPU; two ranks."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.common import ROOT
from pipeline.common.exit_codes import RANK_FAILURE, STOPPED_BY_SIGNAL
from pipeline.common.launcher import free_port
from pipeline.loss.head_choice import HEADS

STEPS = 24  # of the training runs
LOSS_TOLERANCE = 0.01  # relative; attention's backward adds with atomics, and bf16 rounds to 0.4 %
# Largest relative difference of the losses to fp32 on a CPU. Few steps: rounding grows with them, and after eight, bf16
# on a CPU differs by up to 7 % too.
OPTION_STEPS, OPTION_TOLERANCES = 4, {"fp32": 1e-3, "bf16": 2e-2}
RANKS, SHARED_GPU_NCCL = 2, (2, 30)  # from this version on, NCCL runs several ranks on one GPU
ADAPTER = ["--model.adapter.r", "8"]
OPTIONS = {
    "defaults": [],
    "full mixture, gradients to pivots": ["--loss.top_k", "null", "--loss.detach", "[]"],
    "temperature 2": ["--loss.softmax_temperature", "2"],
    "hard tokens": ["--loss.pooling_tokens", "hard"],
    "hidden states, InfoNCE": ["--loss.pooling_tokens", "hidden_states", "--loss.distance", "infonce"],
    "centring": ["--loss.centring", "true"],
    "checkpointing, small budget": ["--model.activation_checkpointing", "true", "--loss.memory_budget_mb", "0.2"],
    "LoRA": ADAPTER,
    "LoRA, embeddings trained": [*ADAPTER, "--model.adapter.train_embeddings", "true"],
}

Result = tuple[str, str]  # status, text


def check_training(_: Path | None) -> Iterator[Result]:
    """Train, stop by SIGUSR1, kill, resume, and train with an offloaded optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, run = _prepare(Path(folder)), Path(folder) / "interrupted"
        offload = ["--deepspeed", "ds_configs/zero3_offload.json"]
        with ThreadPoolExecutor() as pool:  # each start takes longer than the steps
            whole = pool.submit(_train, recipe, Path(folder) / "whole")
            offloaded = pool.submit(_train, recipe, Path(folder) / "offload", *offload)
            signals = ((2, signal.SIGUSR1), (STEPS // 2, signal.SIGKILL))
            ends = [_interrupt(recipe, run, after, by) for after, by in signals]
            resumed, expected = _train(recipe, run), whole.result()
        if len(expected) != STEPS:
            yield "FAILED", f"training: {len(expected)} of {STEPS} steps logged"
            return
        if [status for status, _ in ends] != [STOPPED_BY_SIGNAL, -signal.SIGKILL]:
            print(run.with_suffix(".log").read_text()[-4000:], flush=True)
            yield "FAILED", f"training: (exit status, last step before the signal) of SIGUSR1 and SIGKILL: {ends}"
        else:
            yield _compare_losses("stopped by SIGUSR1, killed and resumed", resumed, expected)
        yield _compare_losses("optimizer offloaded", offloaded.result(), expected)


def check_options(_: Path | None) -> Iterator[Result]:
    """Compare the losses of short runs with different options to those of fp32 on a CPU."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        recipe = _prepare(Path(folder))
        _train(recipe, Path(folder) / "pretrained", "--training.precision", "fp32")
        common = ["--model.path", str(Path(folder) / "pretrained" / "hf"), "--model.config", "null"]
        common += ["--training.max_steps", str(OPTION_STEPS)]

        def train(name: str, precision: str, on_cpu: bool) -> dict[int, float]:
            run = Path(folder) / f"{list(OPTIONS).index(name)}-{precision}-{on_cpu}"
            return _train(recipe, run, *common, *OPTIONS[name], "--training.precision", precision, on_cpu=on_cpu)

        expected = {name: pool.submit(train, name, "fp32", True) for name in OPTIONS}
        measured = {(name, p): pool.submit(train, name, p, False) for p in OPTION_TOLERANCES for name in OPTIONS}
        for (name, precision), losses in measured.items():
            title, tolerance = f"{name}, {precision} against a CPU", OPTION_TOLERANCES[precision]
            yield _compare_losses(title, losses.result(), expected[name].result(), tolerance)


def check_ranks(_: Path | None) -> Iterator[Result]:
    """Compare two ranks with one, for each head, and kill one of two ranks. With one GPU, the ranks share it."""
    if torch.cuda.device_count() < RANKS and torch.cuda.nccl.version() < SHARED_GPU_NCCL:
        found = ".".join(map(str, torch.cuda.nccl.version()))
        yield "short", f"two ranks: needs two GPUs, or NCCL 2.30 for two ranks on one; found one GPU and NCCL {found}"
        return
    yield from compare_ranks(on_cpu=False)


def compare_ranks(*settings: str, on_cpu: bool) -> Iterator[Result]:
    """Do what `check_ranks` says, on GPUs or CPUs, with other settings in the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = _prepare(Path(folder))
        expected = _train(recipe, Path(folder) / "one", *settings, on_cpu=on_cpu)
        for head in HEADS:
            run = Path(folder) / head
            ranks = _start_ranks(recipe, run, *settings, "--loss.head", head, on_cpu=on_cpu)
            if any([rank.wait() for rank in ranks]):
                print(run.with_suffix(".log").read_text()[-2000:], flush=True)
            yield _compare_losses(f"two ranks, head {head}", _losses(run), expected)
        run = Path(folder) / "killed"
        survivor, killed = _start_ranks(recipe, run, *settings, on_cpu=on_cpu)
        _wait_for_step(killed, run, 2)
        killed.kill()
        status = survivor.wait()
        passed = "passed" if status == RANK_FAILURE else "FAILED"
        yield passed, f"two ranks, one killed: the other ends with status {status} (expected: {RANK_FAILURE})"


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


def _start(
    recipe: Path, run: Path, *more: str, on_cpu: bool = False, launcher: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start training on one GPU, or on a CPU. `launcher` has the environment variables of one of several ranks."""
    command = [sys.executable, "pipeline/train.py", "--config", str(recipe), "--output_dir", str(run), *more]
    log = run.with_suffix(".log").open("ab")
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if on_cpu else {}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | hidden | (launcher or {}))


def _start_ranks(recipe: Path, run: Path, *more: str, on_cpu: bool) -> list[subprocess.Popen[bytes]]:
    """Start training on two ranks."""
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    places = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS))
    return [_start(recipe, run, *more, on_cpu=on_cpu, launcher=group | place) for place in places]


def _losses(run: Path) -> dict[int, float]:
    """Return the loss of each logged step."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _train(recipe: Path, run: Path, *more: str, on_cpu: bool = False) -> dict[int, float]:
    """Train to the end and return the loss of each step."""
    status = _start(recipe, run, *more, on_cpu=on_cpu).wait()
    if status:
        print(run.with_suffix(".log").read_text()[-2000:], flush=True)
    return _losses(run)


def _interrupt(recipe: Path, run: Path, after: int, by: signal.Signals) -> tuple[int, int]:
    """Train and send a signal once step `after` is logged. Return the exit status and the last step logged before."""
    process = _start(recipe, run)
    last = _wait_for_step(process, run, after)
    process.send_signal(by)
    return process.wait(), last


def _wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> int:
    """Wait until a step is logged or the process has ended. Return the last step logged."""
    while process.poll() is None and max(_losses(run), default=0) < step:
        time.sleep(0.002)
    return max(_losses(run), default=0)


def _compare_losses(
    name: str, losses: dict[int, float], expected: dict[int, float], tolerance: float = LOSS_TOLERANCE
) -> Result:
    """Compare the losses of a run, step by step, with the expected ones."""
    if losses.keys() != expected.keys() or not losses:
        return "FAILED", f"{name}: steps {sorted(losses)} instead of {sorted(expected)}"
    error = max(abs(losses[step] / expected[step] - 1) for step in expected)
    return ("passed" if error <= tolerance else "FAILED"), f"{name}: losses differ by at most {error:.1e}"

"""Run the whole pipeline on generated data (`make demo`), stage by stage. Finished stages are skipped."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.launcher import free_port
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.data.mixture import shard_directories

RECIPE = Path("pipeline/recipes/demo.yaml")


@dataclass(frozen=True)
class Stage:
    """Stage of the demo: its command, and the file or directory that exists once it has finished."""

    name: str
    output: Path
    command: list[str | Path]


def demo_stages(config: Config, ranks: int) -> list[Stage]:
    """Return the stages in order. The batch size must be divisible by `ranks`."""
    run, tokenizer = Path(config.output_dir), Path(config.data.tokenizer or "")
    (shards,) = shard_directories(config.data.shards)
    data, test, model = run / "train.jsonl", run / "train.test.jsonl", run / "hf"
    micro_batch = min(config.training.train_micro_batch_size_per_gpu, config.training.train_batch_size // ranks)
    module: list[str | Path] = [sys.executable, "-m"]
    launcher: list[str | Path] = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", str(ranks)]
    commands: dict[tuple[str, Path], list[str | Path]] = {
        ("generate", test): [*module, "data_prep", "demo", "--output", data, "--test_output", test],
        ("tokenizer", tokenizer): [
            *(*module, "data_prep", "tokenizer", "--vocab_size", "2048"),
            *("--input", data, "--output", tokenizer),
        ],
        ("pack", shards / "manifest.json"): [
            *(*module, "data_prep", "pack", "--max_seq_length", "1024"),
            *("--input", data, "--tokenizer", tokenizer, "--output", shards),
        ],
        ("train", run / "trained"): [
            *(*launcher, "--master_port", str(free_port()), "pipeline/train.py", "--config", RECIPE),
            *("--training.train_micro_batch_size_per_gpu", str(micro_batch)),
        ],
        ("evaluate", run / "evaluation.json"): [
            *(*module, "pipeline.evaluation", "--max_new_tokens", "96", "--batch_size", "100"),
            *("--model", model, "--data", test, "--output", run),
        ],
        ("report", run / "report.md"): [*module, "pipeline.report", "--run", run],
    }
    return [Stage(name, output, command) for (name, output), command in commands.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every stage that has not finished.

    Raises:
        UserError: a stage failed.
    """
    argparse.ArgumentParser(prog="python -m pipeline.demo", description=__doc__).parse_args(arguments)
    config = load_config(RECIPE, [])
    run, gpus = Path(config.output_dir), torch.cuda.device_count()
    environment = dict(os.environ)
    if gpus == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # Use as many GPUs (or CPU processes) as possible. The batch size must be divisible by their number.
    ranks = max(n for n in range(1, (gpus or 2) + 1) if config.training.train_batch_size % n == 0)
    for stage in demo_stages(config, ranks):
        if stage.output.exists():
            print(f"{stage.name:10} skipped, {stage.output} exists")
            continue
        print(f"{stage.name:10} {' '.join(map(str, stage.command[1:]))}", flush=True)
        stage_start = time.perf_counter()
        status = subprocess.run(stage.command, env=environment).returncode
        if status:
            raise UserError(f"stage {stage.name} failed with status {status}; see its message above")
        if stage.name == "train":
            stage.output.touch()
        print(f"{stage.name:10} done in {time.perf_counter() - stage_start:.0f} s", flush=True)
    print(f"{run} is complete ({time.perf_counter() - start:.0f} s): see {run / 'report.html'}")


if __name__ == "__main__":
    exit_cleanly(main)

"""`make demo`: the whole job on generated data, stage by stage, into runs/demo. Finished stages are not done again."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.common.distributed import free_port
from pipeline.common.errors import UserError, exit_cleanly

RUN = Path("runs/demo")
RECIPE = Path("pipeline/recipes/demo.yaml")


TRAIN_BATCH_SIZE = 8  # of the recipe


@dataclass(frozen=True)
class Stage:
    """A command and the file or directory that it leaves when it is done."""

    name: str
    makes: Path
    command: list[str]

    def then(self, *words: str | Path) -> "Stage":
        """With more words: strings are split at spaces, paths are taken whole."""
        more = [w for word in words for w in ([str(word)] if isinstance(word, Path) else word.split())]
        return replace(self, command=self.command + more)


def stage(name: str, makes: Path, program: list[str], *words: str | Path) -> Stage:
    return Stage(name, makes, program).then(*words)


def stages(ranks: int) -> list[Stage]:
    """All of them in order. `ranks` divide the recipe's batch."""
    python = [sys.executable, "-m"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    micro = min(2, TRAIN_BATCH_SIZE // ranks)
    data, test, tokenizer, shards = (RUN / name for name in ("train.jsonl", "train.test.jsonl", "tokenizer", "shards"))
    return [
        stage("generate", test, python, "data_prep demo --output", data, "--test_output", test),
        stage(
            "tokenizer", tokenizer, python, "data_prep tokenizer --vocab_size 2048 --input", data, "--output", tokenizer
        ),
        stage("pack", shards / "manifest.json", python, "data_prep pack --max_seq_length 1024 --input", data).then(
            "--tokenizer", tokenizer, "--output", shards
        ),
        stage(
            "train", RUN / "trained", launcher, f"--master_port {free_port()} pipeline/train.py --config", RECIPE
        ).then(f"--training.train_micro_batch_size_per_gpu {micro}"),
        stage("export", RUN / "hf", python, "pipeline.export --checkpoint", RUN, "--output", RUN / "hf"),
        stage(
            "evaluate",
            RUN / "evaluation.json",
            python,
            "pipeline.evaluation --model",
            RUN / "hf",
            "--data",
            test,
        ).then("--max_new_tokens 96 --batch_size 100 --output", RUN),
        stage("report", RUN / "report.md", python, "pipeline.report --run", RUN),
    ]


def main() -> None:
    """Run every stage that is not done."""
    gpus = torch.cuda.device_count()
    environment = dict(os.environ)
    if gpus == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    RUN.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    # All GPUs, if they divide the batch; else as many as do.
    ranks = max(n for n in range(1, (gpus or 2) + 1) if TRAIN_BATCH_SIZE % n == 0)
    for item in stages(ranks):
        if item.makes.exists():
            print(f"{item.name:10} done before ({item.makes})")
            continue
        print(f"{item.name:10} {' '.join(item.command[1:])}", flush=True)
        started = time.perf_counter()
        result = subprocess.run(item.command, env=environment)
        if result.returncode:
            raise UserError(f"stage {item.name} ended with status {result.returncode}; its message is above")
        if item.name == "train":
            item.makes.touch()
        print(f"{item.name:10} done in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{RUN} is complete ({time.perf_counter() - begin:.0f} s): see {RUN / 'report.html'}")


if __name__ == "__main__":
    exit_cleanly(main)

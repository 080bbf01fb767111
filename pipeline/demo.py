"""`make demo`: the whole job on generated data, stage by stage, into runs/demo. Finished stages are not done again."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.errors import UserError, exit_cleanly

RUN = Path("runs/demo")
RECIPE = Path("pipeline/recipes/demo.yaml")


@dataclass(frozen=True)
class Stage:
    """A command and the file or directory that it leaves when it is done."""

    name: str
    makes: Path
    command: list[str]


def stages(ranks: int) -> list[Stage]:
    python = [sys.executable, "-m"]
    data, test = RUN / "train.jsonl", RUN / "train.test.jsonl"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_accelerators={ranks}"]
    return [
        Stage("generate", test, [*python, "data_prep", "demo", "--output", str(data)]),
        Stage(
            "tokenizer",
            RUN / "tokenizer",
            [*python, "data_prep", "tokenizer", "--input", str(data), "--output", str(RUN / "tokenizer")]
            + ["--vocab_size", "2048"],
        ),
        Stage(
            "pack",
            RUN / "shards" / "manifest.json",
            [*python, "data_prep", "pack", "--input", str(data), "--tokenizer", str(RUN / "tokenizer")]
            + ["--output", str(RUN / "shards"), "--max_seq_length", "1024"],
        ),
        Stage("train", RUN / "trained", [*launcher, "pipeline/train.py", "--config", str(RECIPE)]),
        Stage("export", RUN / "hf", [*python, "pipeline.export", "--checkpoint", str(RUN), "--output", str(RUN / "hf")]),
        Stage(
            "evaluate",
            RUN / "evaluation.json",
            [*python, "pipeline.evaluation", "--model", str(RUN / "hf"), "--data", str(test), "--output", str(RUN)]
            + ["--max_new_tokens", "96", "--batch_size", "100"],
        ),
        Stage("report", RUN / "report.md", [*python, "pipeline.report", "--run", str(RUN)]),
    ]


def main() -> None:
    """Run every stage that is not done, each with its output in runs/demo/NAME.log."""
    gpus = torch.cuda.device_count()
    environment = dict(os.environ)
    if gpus == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    RUN.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for stage in stages(gpus or 2):
        if stage.makes.exists():
            print(f"{stage.name:10} done before ({stage.makes})")
            continue
        print(f"{stage.name:10} {' '.join(stage.command[1:])}", flush=True)
        started = time.perf_counter()
        result = subprocess.run(stage.command, env=environment)
        if result.returncode:
            raise UserError(f"stage {stage.name} ended with status {result.returncode}; its message is above")
        if stage.name == "train":
            stage.makes.touch()
        print(f"{stage.name:10} done in {time.perf_counter() - started:.0f} s", flush=True)
    print(f"all done in {time.perf_counter() - begin:.0f} s: see {RUN / 'report.md'} and {RUN / 'report.png'}")


if __name__ == "__main__":
    exit_cleanly(main)

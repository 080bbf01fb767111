"""`make demo`: the whole job on generated data, stage by stage, into runs/demo. Finished stages are not done again."""

import os
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
    python = f"{sys.executable} -m"
    launcher = f"{Path(sys.executable).with_name('deepspeed')} --num_accelerators={ranks}"
    data, test, tokenizer, shards = "train.jsonl", "train.test.jsonl", "tokenizer", "shards"
    commands = {
        ("generate", test): f"{python} data_prep demo --output {RUN}/{data} --test_output {RUN}/{test}",
        ("tokenizer", tokenizer): f"{python} data_prep tokenizer --input {RUN}/{data} --output {RUN}/{tokenizer} "
        "--vocab_size 2048",
        ("pack", f"{shards}/manifest.json"): f"{python} data_prep pack --input {RUN}/{data} --tokenizer "
        f"{RUN}/{tokenizer} --output {RUN}/{shards} --max_seq_length 1024",
        ("train", "trained"): f"{launcher} pipeline/train.py --config {RECIPE}",
        ("export", "hf"): f"{python} pipeline.export --checkpoint {RUN} --output {RUN}/hf",
        ("evaluate", "evaluation.json"): f"{python} pipeline.evaluation --model {RUN}/hf --data {RUN}/{test} "
        f"--output {RUN} --max_new_tokens 96 --batch_size 100",
        ("report", "report.md"): f"{python} pipeline.report --run {RUN}",
    }
    return [Stage(name, RUN / makes, command.split()) for (name, makes), command in commands.items()]


def main() -> None:
    """Run every stage that is not done."""
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
    print(f"{RUN} is complete ({time.perf_counter() - begin:.0f} s): see {RUN / 'report.md'} and {RUN / 'report.png'}")


if __name__ == "__main__":
    exit_cleanly(main)

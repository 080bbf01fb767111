"""Run a small study on generated data (`make demo`): plain fine-tuning and SOLAR. Finished stages are skipped."""

import argparse
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.common.errors import UserError, exit_cleanly
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.study.local import MODULE, machine_environment, run_study
from pipeline.study.plan import begin_study
from pipeline.study.settings import StudySettings

RECIPE = Path("pipeline/recipes/demo.yaml")
GENERATE: tuple[str, ...] = ()  # arguments of `python -m data_prep demo`
VOCABULARY = 2048


def demo_study(config: Config, ranks: int) -> StudySettings:
    """Return the study of the demo: two variants with the recipe's seed, evaluated on the generated test problems."""
    root, training = Path(config.output_dir).parent, config.training
    micro_batch = min(training.train_micro_batch_size_per_gpu, training.train_batch_size // ranks)
    return StudySettings(
        output=str(root),
        model=None,
        recipe=str(RECIPE),
        train=(str(root / "train.jsonl"),),
        test=str(root / "train.test.jsonl"),
        dev=None,
        answers=str(root / "train.test.jsonl"),
        variants=("sft", "solar"),
        seeds=(config.seed,),
        primary=("mean",),
        prepare_args="--max_seq_length 1024",
        train_args=f"--training.train_micro_batch_size_per_gpu {micro_batch}",
        evaluate_args="--max_new_tokens 96 --batch_size 100",
    )


def prepare(study: StudySettings, tokenizer: Path, environment: dict[str, str]) -> None:
    """Generate the problems and train a tokenizer on them, unless they exist.

    Raises:
        UserError: a command failed.
    """
    (train,) = study.train
    generate = ["demo", *GENERATE, "--output", train, "--test_output", study.test]
    learn = ["tokenizer", "--vocab_size", str(VOCABULARY), "--input", train, "--output", str(tokenizer)]
    for name, output, arguments in (("generate", Path(study.test), generate), ("tokenizer", tokenizer, learn)):
        if output.exists():
            print(f"{name}: done already")
            continue
        print(f"{name}\n  -m data_prep {' '.join(arguments)}", flush=True)
        start = time.perf_counter()
        if status := subprocess.run([*MODULE, "data_prep", *arguments], env=environment).returncode:
            raise UserError(f"{name} failed with status {status}; see its message above")
        print(f"{name} took {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every stage that has not finished. Return the exit status: 0, or 75 after a signal.

    Raises:
        UserError: a stage failed.
    """
    argparse.ArgumentParser(prog="python -m pipeline.demo", description=__doc__).parse_args(arguments)
    start, gpus = time.perf_counter(), torch.cuda.device_count()
    config, environment = load_config(RECIPE, []), machine_environment(gpus)
    # Use as many GPUs (or CPU processes) as possible. The batch size must be divisible by their number.
    ranks = max(n for n in range(1, (gpus or 2) + 1) if config.training.train_batch_size % n == 0)
    study = demo_study(config, ranks)
    prepare(study, Path(config.data.tokenizer or ""), environment)
    if status := run_study(begin_study(study), ranks, environment):
        return status
    print(f"{study.output} is complete ({time.perf_counter() - start:.0f} s): see {study.report / 'report.html'}")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)

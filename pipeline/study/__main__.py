"""Train variants of one model with several seeds, evaluate and compare them: on one machine, or for Slurm.

    python -m pipeline.study run --model models/Qwen2.5-0.5B-Instruct --recipe pipeline/recipes/qwen2.5-0.5b.yaml \
        --train train.jsonl --dev dev.jsonl --test test.jsonl --seeds 1 2 3 --output runs/qwen

`run` does all of it on this machine and resumes where it was interrupted. `jobs` prints the jobs that remain as calls
of a shell function, for slurm/experiment.sh; `choose` and `compare` are steps of these jobs. The variants are in
variants.yaml.
"""

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.common.errors import UserError, exit_cleanly
from pipeline.study.plan import Job, begin_study, plan_jobs, read_variants
from pipeline.study.settings import StudySettings, read_study


def shell_call(job: Job) -> str:
    """Format a job as a call of the function `job` of slurm/experiment.sh: KIND NAME AFTER VARIABLE=VALUE..."""
    variables = {**job.variables, f"{job.kind.upper()}_ARGS": " ".join(job.arguments)}
    words = ["job", job.kind, job.name, " ".join(job.after), *(f"{name}={value}" for name, value in variables.items())]
    return shlex.join(words)


def print_jobs(study: StudySettings) -> None:
    """Print the jobs that are not done, without dependencies on those that are."""
    jobs = plan_jobs(study)
    done = {job.name for job in jobs if job.done}
    for job in jobs:
        if not job.done:
            after = tuple(name for name in job.after if name not in done)
            print(shell_call(replace(job, after=after)))


def _add_study_options(parser: argparse.ArgumentParser) -> None:
    _, _, variants = read_variants()
    parser.add_argument(
        "--model", help="Hugging Face directory that all variants start from; default: the recipe's model.config"
    )
    parser.add_argument("--recipe", required=True, help="recipe that the variants change")
    parser.add_argument("--train", nargs="+", required=True, help="canonical records to train on")
    parser.add_argument("--test", required=True, help="records of the test split, evaluated once for each run")
    parser.add_argument("--dev", help="records on which trials choose a setting of each variant; default: no trials")
    parser.add_argument("--answers", help="records with worked answers, on which representations are measured")
    parser.add_argument("--variants", nargs="+", default=list(variants), help="default: all of variants.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="training seeds")
    parser.add_argument("--primary", nargs="+", default=["mean"], help="measure that decides: mean, or languages")
    parser.add_argument("--output", required=True, help="directory of the study")
    for name, program in (("prepare", "data_prep pack"), ("train", "train.py"), ("evaluate", "pipeline.evaluation")):
        parser.add_argument(f"--{name}_args", default="", help=f"arguments of {program}, as one word, split at spaces")


def _settings(args: argparse.Namespace) -> StudySettings:
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds: a seed is given twice")
    values = {name: getattr(args, name) for name in StudySettings.__dataclass_fields__}
    return begin_study(StudySettings.from_values(values))


def _run(args: argparse.Namespace) -> int:
    import torch

    from pipeline.study.local import machine_environment, run_study

    gpus = torch.cuda.device_count()
    return run_study(_settings(args), args.ranks or gpus or 1, machine_environment(gpus))


def _jobs(args: argparse.Namespace) -> int:
    print_jobs(_settings(args))
    return 0


def _choose(args: argparse.Namespace) -> int:
    from pipeline.study.results import choose_settings

    choose_settings(read_study(args.output))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pipeline.study.local import report_command
    from pipeline.study.results import compare_variants

    study = read_study(args.output)
    print(compare_variants(study))
    return subprocess.run(report_command(study)).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.study", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run everything on this machine", allow_abbrev=False)
    run.set_defaults(function=_run)
    run.add_argument("--ranks", type=int, help="ranks of training and evaluation; default: all GPUs, or 1")
    jobs = commands.add_parser("jobs", help="print the remaining jobs for slurm/experiment.sh", allow_abbrev=False)
    jobs.set_defaults(function=_jobs)
    for parser_of_study in (run, jobs):
        _add_study_options(parser_of_study)
    for name, function, text in (
        ("choose", _choose, "select the setting of each variant by its trials"),
        ("compare", _compare, "compare the evaluated variants, and write the report"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(function=function)
        command.add_argument("--output", type=Path, required=True, help="directory of the study")
    args = parser.parse_args(arguments)
    return int(args.function(args))


if __name__ == "__main__":
    exit_cleanly(main)

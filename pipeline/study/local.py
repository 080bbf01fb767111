"""Run the jobs of a study one after another on this machine."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import pipeline
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.study.plan import Job, plan_jobs, read_variants
from pipeline.study.results import choose_settings, compare_variants
from pipeline.study.settings import StudySettings

TRAINER = Path(pipeline.__file__).with_name("train.py")
MODULE = (sys.executable, "-m")


class Stopped(Exception):
    """A signal has stopped the command in progress, which has saved its state."""


class CommandRunner:
    """Runs commands and passes TERM and USR1 on to them.

    Args:
        environment: environment of the commands.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def run(self, command: Sequence[str]) -> None:
        """Run a command to its end.

        Raises:
            UserError: it failed.
            Stopped: a signal was received.
        """
        if self._stopped:
            raise Stopped
        print(f"  {shlex.join(command[1:])}", flush=True)
        self._process = subprocess.Popen(command, env=self.environment)
        status = self._process.wait()
        self._process = None
        if self._stopped or status == STOPPED_BY_SIGNAL:
            raise Stopped
        if status:
            raise UserError(f"the command ended with status {status}; see its message above: {shlex.join(command)}")


def run_study(study: StudySettings, ranks: int, environment: dict[str, str]) -> int:
    """Run every job that is not done. A job that was interrupted resumes.

    Args:
        study: settings of the study.
        ranks: number of ranks of training and evaluation.
        environment: environment of the commands.

    Returns:
        The exit status: 0, or 75 after a signal.

    Raises:
        UserError: a job failed.
    """
    runner = CommandRunner(environment)
    jobs = plan_jobs(study)
    for number, job in enumerate(jobs, start=1):
        if job.done:
            print(f"[{number}/{len(jobs)}] {job.name}: done already", flush=True)
            continue
        print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
        start = time.perf_counter()
        try:
            if job.kind == "choose":
                choose_settings(study)
            for command in job_commands(job, study, ranks):
                runner.run(command)
            if job.kind == "compare":
                print(compare_variants(study))
                runner.run(report_command(study))
        except Stopped:
            print(f"stopped by a signal during {job.name}; run the same command to resume", flush=True)
            return STOPPED_BY_SIGNAL
        print(f"[{number}/{len(jobs)}] {job.name} took {time.perf_counter() - start:.0f} s", flush=True)
    return 0


def job_commands(job: Job, study: StudySettings, ranks: int) -> Iterator[list[str]]:
    """Yield the commands of a job that remain to be run."""
    if job.kind == "prepare":
        yield from _prepare_commands(job)
    elif job.kind == "train":
        choice = Path(job.variables["CHOICE"]).read_text().splitlines() if "CHOICE" in job.variables else []
        launcher = launch(ranks, [str(TRAINER)])
        yield [*launcher, "--config", job.variables["RECIPE"], *job.arguments, *choice]
    elif job.kind == "evaluate":
        run = job.variables["RUN"]
        if not Path(run, "hf").exists():  # the recipe does not export at the end
            yield [*MODULE, "pipeline.export", "--checkpoint", run, "--output", f"{run}/hf", "--update"]
        evaluation = ["--model", f"{run}/hf", "--data", job.variables["DATA"], "--output", run, *job.arguments]
        yield [*launch(ranks, ["-m", "pipeline.evaluation"]), *evaluation]
    elif job.kind == "compare" and study.answers:
        for path in study.evaluated_runs():
            if not (path / "representations.json").is_file():
                measure = ["--model", str(path / "hf"), "--data", study.answers, "--output", str(path)]
                yield [*MODULE, "pipeline.representations", *measure]


def _prepare_commands(job: Job) -> Iterator[list[str]]:
    names = job.variables
    shards, inputs = Path(names["SHARDS"]), names["INPUT"].split()
    if "DERIVE" in names:
        derived = f"{shards}.jsonl"
        if not Path(derived).is_file():
            yield [*MODULE, "data_prep", "derive", names["DERIVE"], "--input", *inputs, "--output", derived]
        inputs = [derived]
    if not (shards / "manifest.json").is_file():
        tokenizer = ["--tokenizer", names["TOKENIZER"]]
        yield [*MODULE, "data_prep", "pack", "--input", *inputs, *tokenizer, "--output", str(shards), *job.arguments]
    if "WEIGHTS" in names:
        weights = ["--model", names["MODEL"], "--output", names["WEIGHTS"]]
        yield [*MODULE, "data_prep", "weights", str(shards), *weights]


def launch(ranks: int, program: list[str]) -> list[str]:
    """Return the beginning of a command that runs a program on ranks of this machine."""
    if ranks == 1:
        return [sys.executable, *program]
    # torchrun, unlike the deepspeed launcher, passes TERM on to the ranks.
    return [*MODULE, "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]


def report_command(study: StudySettings) -> list[str]:
    """Return the command that writes the report of the base and of each variant's first seed, the baseline first."""
    baseline, _, _ = read_variants()
    names = [baseline, *(name for name in study.variants if name != baseline)]
    runs = [study.run(name, study.seeds[0]) for name in names]
    if study.base:
        runs.append(study.base)
    paths = ["--run", *map(str, runs), "--output", str(study.report)]
    return [*MODULE, "pipeline.report", *paths, "--primary", *study.primary]


def machine_environment(gpus: int) -> dict[str, str]:
    """Return the environment of the commands: this one, with DeepSpeed's CPU accelerator if there are no GPUs."""
    if gpus:
        return dict(os.environ)
    return {"OMP_NUM_THREADS": "1", **os.environ, "DS_ACCELERATOR": "cpu"}

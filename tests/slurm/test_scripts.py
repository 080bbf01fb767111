"""The job scripts with a probe in place of the trainer: the environment of ranks and the handling of exit statuses."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT
from tests.slurm.conftest import Cluster, log_of, until

pytestmark = pytest.mark.slow

PROBE = """
import json, os, sys
status, job = int(sys.argv[-1]), os.environ["SLURM_JOB_ID"]
if status == 0:
    sys.path[0] = "."
    from pipeline.common.launcher import set_launcher_environment
    set_launcher_environment()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURMD_NODENAME",
         "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "SLURM_CPUS_ON_NODE")
with open(f"seen-{job}-{os.environ['SLURM_PROCID']}", "w") as file:
    json.dump({name: os.environ.get(name) for name in names}, file)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose trainer and evaluation record their environment and exit with the status they are given."""
    root = tmp_path_factory.mktemp("probes")
    (root / "slurm").symlink_to(ROOT / "slurm")
    (root / "pipeline").mkdir()
    (root / "pipeline" / "common").symlink_to(ROOT / "pipeline" / "common")
    for name in ("train.py", "evaluation.py"):
        (root / "pipeline" / name).write_text(PROBE)
    (root / "recipe.yaml").touch()
    (root / "run" / "hf").mkdir(parents=True)
    return root


def rank_environments(checkout: Path, job: str) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(checkout.glob(f"seen-{job}-*"))]


def log(checkout: Path, job: str) -> str:
    return next(checkout.glob(f"slurm-*-{job}.log")).read_text()


def test_on_all_ranks_one_rank_per_gpu_or_task(cluster: Cluster, probes: Path) -> None:
    # sbatch flags: nodes, ranks per node, CUDA_VISIBLE_DEVICES, threads per rank (all CPUs of the job are used)
    cases = {
        "--nodes=2 --gpus-per-node=2 --cpus-per-gpu=3": (2, 2, "0,1", "3"),
        "--gpus-per-task=1 --ntasks-per-node=2": (1, 2, "0,1", "1"),
        "--ntasks-per-node=2 --cpus-per-task=2": (1, 2, None, "2"),
    }
    script = ("slurm/train.sh", 0)
    variables = {"RECIPE": "recipe.yaml", "OMP_NUM_THREADS": ""}
    jobs = [cluster.sbatch(*flags.split(), *script, cwd=probes, **variables) for flags in cases]
    for job, (nodes, ranks_per_node, gpus, threads) in zip(jobs, cases.values(), strict=True):
        assert cluster.end(job)["JobState"] == "COMPLETED", log(probes, job)
        ranks = rank_environments(probes, job)
        assert [rank.pop("SLURMD_NODENAME") == rank.pop("MASTER_ADDR") for rank in ranks] == [
            rank < ranks_per_node for rank in range(nodes * ranks_per_node)
        ]
        assert ranks == [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % ranks_per_node),
                "WORLD_SIZE": str(nodes * ranks_per_node),
                "LOCAL_WORLD_SIZE": str(ranks_per_node),
                "CUDA_VISIBLE_DEVICES": gpus,
                "DS_ACCELERATOR": None if gpus else "cpu",
                "OMP_NUM_THREADS": threads,
                "SLURM_CPUS_ON_NODE": str(ranks_per_node * int(threads)),
            }
            for rank in range(nodes * ranks_per_node)
        ]


def test_job_does_not_take_variables_of_the_job_it_is_submitted_from(cluster: Cluster, probes: Path) -> None:
    outer = "-N1 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=2 --mem-per-cpu=200"
    command = "sbatch --parsable --mem=500 slurm/train.sh 0"
    words = ["salloc", "-Q", *outer.split(), "bash", "-c", command]
    job = cluster.run(*words, cwd=probes, RECIPE="recipe.yaml", SLURM_ARRAY_JOB_ID="1").strip()
    assert cluster.end(job)["JobState"] == "COMPLETED", log(probes, job)
    (rank,) = rank_environments(probes, job)
    assert (rank["CUDA_VISIBLE_DEVICES"], rank["DS_ACCELERATOR"]) == (None, "cpu")


def test_finish_requeues_job_submitted_from_task_of_array(cluster: Cluster, probes: Path) -> None:
    outer = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"}
    job = cluster.sbatch("slurm/train.sh", 75, cwd=probes, RECIPE="recipe.yaml", **outer)
    expected = ("PENDING", "0:0", "1")
    assert outcome(cluster, job, expected) == expected, log(probes, job)
    cluster.run("scancel", job)


def test_on_one_rank_and_all_ranks_of_jobs_with_totals(cluster: Cluster, probes: Path) -> None:
    """A total of GPUs or of tasks over two nodes, which then have different numbers of CPUs."""
    lines = ["#!/bin/bash", "source slurm/env.sh", "source slurm/lib.sh", "on_one_rank true && on_all_ranks true"]
    (probes / "steps.sh").write_text("\n".join(lines))
    flags = ("--nodes=2 --gpus=4", "--nodes=2 --ntasks=4 --gpus-per-node=2 --cpus-per-task=2")
    for job in [cluster.sbatch(*text.split(), "steps.sh", cwd=probes) for text in flags]:
        assert cluster.end(job)["JobState"] == "COMPLETED", log(probes, job)


def outcome(cluster: Cluster, job: str, expected: tuple[str, str, str]) -> tuple[str, ...]:
    """State, exit code and restarts of a job, once its state and restarts are as expected (or after a minute)."""

    def current() -> tuple[str, ...]:
        fields = cluster.job(job)
        return fields["JobState"], fields["ExitCode"], fields["Restarts"]

    until(lambda: current()[::2] == expected[::2], 60, lambda: f"job {job} is {current()}")
    return current()


def test_finish_ends_or_requeues_by_exit_status(cluster: Cluster, probes: Path) -> None:
    """One node each, so that the jobs run in parallel."""
    cases = {
        (0, ""): ("COMPLETED", "0:0", "0"),
        (2, ""): ("FAILED", "2:0", "0"),
        (77, ""): ("FAILED", "77:0", "0"),
        (75, ""): ("PENDING", "0:0", "1"),
        (1, ""): ("PENDING", "0:0", "1"),
        (137, ""): ("PENDING", "0:0", "1"),
        (75, "--no-requeue"): ("FAILED", "75:0", "0"),
    }
    jobs = {
        (status, flag): cluster.sbatch(
            *filter(None, [flag]), "slurm/train.sh", status, cwd=probes, RECIPE="recipe.yaml"
        )
        for status, flag in cases
    }
    for (status, flag), expected in cases.items():
        job = jobs[status, flag]
        assert outcome(cluster, job, expected) == expected, log(probes, job)
        if expected[0] == "PENDING":
            cluster.run("scancel", job)
    assert "cannot be requeued" in log(probes, jobs[75, "--no-requeue"])


def test_finish_requeues_single_array_task(cluster: Cluster, probes: Path) -> None:
    array = cluster.sbatch("--array=0-1", "slurm/train.sh", 75, cwd=probes, RECIPE="recipe.yaml")

    def restarts() -> list[str]:
        return re.findall(r"Restarts=(\d+)", cluster.run("scontrol", "-o", "show", "job", array))

    until(lambda: restarts() == ["1", "1"], 60, lambda: str(restarts()))  # each exactly once
    cluster.run("scancel", array)


def test_finish_limits_restarts_after_failures(cluster: Cluster, probes: Path) -> None:
    """The probe fails like a trainer that cannot be imported: before it can record its start. One node each."""
    (probes / "test.jsonl").touch()
    jobs = [
        cluster.sbatch("slurm/train.sh", 1, cwd=probes, RECIPE="recipe.yaml"),
        cluster.sbatch("slurm/evaluate.sh", 1, cwd=probes, RUN="run", DATA="test.jsonl"),
    ]

    def all_ended() -> bool:
        waiting = [job for job in jobs if cluster.state(job) == "PENDING"]
        time.sleep(2)  # a start in the same second as the previous end is refused as a revoked credential
        for job in waiting:  # skip the two minutes that Slurm holds a requeued job back
            command = ["scontrol", "update", f"jobid={job}", "StartTime=now"]
            subprocess.run(command, env=cluster.environment, capture_output=True)
        # The state is FAILED for a moment while a job is requeued, too.
        return all(cluster.state(job) == "FAILED" and "not requeued" in log(probes, job) for job in jobs)

    until(all_ended, 300, lambda: log_of(probes))
    for job in jobs:
        fields = cluster.job(job)
        assert (fields["ExitCode"], fields["Restarts"]) == ("1:0", "3")
        assert "restarted 3 times after failures: not requeued" in log(probes, job)
        assert not list(probes.glob(f"*-{job}.failures"))


def test_job_without_packages_names_make_install(tmp_path: Path) -> None:
    """The job script in its own shell, with a Python that has no site-packages, as in a fresh clone."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "recipe.yaml").touch()
    commands = {"python": f'exec {sys.prefix}/bin/python -I -S "$@"', "scontrol": "echo localhost"}
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_ON_NODE": "1"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "RECIPE": "recipe.yaml"}
    result = subprocess.run(
        ["bash", "slurm/train.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and "make install" in line


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("train.sh", {"RECIPE": "missing.yaml"}, "error: missing.yaml: no such file; set RECIPE to a recipe"),
        ("prepare.sh", {"INPUT": "a.jsonl"}, "error: a.jsonl: no such file; set INPUT to files of records"),
        ("prepare.sh", {"INPUT": "recipe.yaml"}, "error: TOKENIZER is not set"),
        ("evaluate.sh", {"RUN": "missing"}, "error: missing: no such file; set RUN to the output_dir of a run"),
    ],
)
def test_job_names_missing_input(cluster: Cluster, probes: Path, script: str, variables: dict, message: str) -> None:
    job = cluster.sbatch(f"slurm/{script}", cwd=probes, **variables)
    ended = cluster.end(job)
    until(lambda: message in log(probes, job), 10, lambda: log(probes, job))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")


def test_scripts_refuse_other_working_directory(tmp_path: Path) -> None:
    for script in ("train", "prepare", "evaluate", "submit"):
        result = subprocess.run([ROOT / "slurm" / f"{script}.sh"], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2 and "from the root of the repository" in result.stderr


def test_submit_cancels_jobs_when_sbatch_fails(cluster: Cluster, probes: Path) -> None:
    command = [ROOT / "slurm" / "submit.sh"]
    environment = {**cluster.environment, "PREPARE_FLAGS": "--hold", "TRAIN_FLAGS": "--partition=none"}
    result = subprocess.run(command, cwd=probes, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "partition" in result.stderr
    prepare = result.stdout.split()[1]
    assert result.stderr.splitlines()[-1] == f"cancelled {prepare}"
    assert cluster.state(prepare) == "CANCELLED"


@pytest.mark.parametrize("page", ["README.md", "docs/slurm.md"])
def test_slurm_accepts_documented_commands(cluster: Cluster, page: str) -> None:
    """Unchanged except for the size of the cluster, and without starting anything."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if re.match(r"(\w+=\S+ )*sbatch ", line)]
    assert len(commands) >= 2
    for line in commands:
        line = line.replace("sbatch ", "sbatch --test-only ").replace("--nodes=4", "--nodes=2")
        line = line.replace("--gpus-per-node=8 --cpus-per-gpu=8", "--gpus-per-node=2 --cpus-per-gpu=2")
        cluster.run("bash", "-c", line)

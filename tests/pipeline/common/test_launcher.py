"""Launcher variables set from those of mpirun and srun."""

import os

import pytest

from pipeline.common.errors import UserError
from pipeline.common.launcher import MPI_VARIABLES, set_launcher_environment

STEP = {
    "SLURM_STEP_NUM_TASKS": "19",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),3",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "20123"}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launcher_variables(monkeypatch, variables: dict[str, str]) -> dict[str, str]:
    """The launcher's variables after `set_launcher_environment` with the given environment."""
    for name in [*LAUNCHER, "LOCAL_SIZE", *STEP, *(name for names in MPI_VARIABLES for name in names)]:
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what set_launcher_environment sets
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_launcher_environment()
    return {name: os.environ[name] for name in LAUNCHER if name in os.environ}


def test_set_launcher_environment_one_rank_per_task(monkeypatch):
    result = launcher_variables(monkeypatch, {**STEP, **RENDEZVOUS})
    assert result == {"RANK": "17", "LOCAL_RANK": "1", "WORLD_SIZE": "19", "LOCAL_WORLD_SIZE": "3", **RENDEZVOUS}


def test_set_launcher_environment_single_task_without_rendezvous(monkeypatch):
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    result = launcher_variables(monkeypatch, {**step, "SLURM_LOCALID": "0"})
    assert (result["RANK"], result["WORLD_SIZE"], result["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_set_launcher_environment_keeps_torchrun_in_a_step(monkeypatch):
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **RENDEZVOUS}
    assert launcher_variables(monkeypatch, {**STEP, **torchrun}) == torchrun


def test_set_launcher_environment_deepspeed(monkeypatch):
    """The launcher of DeepSpeed 0.19 has another name for the number of local ranks."""
    ranks = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **RENDEZVOUS}
    assert launcher_variables(monkeypatch, {**ranks, "LOCAL_SIZE": "8"}) == {**ranks, "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize("names", MPI_VARIABLES, ids=["Open MPI", "MPICH", "Cray"])
def test_set_launcher_environment_mpirun(monkeypatch, names):
    """Also inside an srun step, where Slurm's variables are those of the daemon that mpirun started."""
    expected = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **RENDEZVOUS}
    mpi = dict(zip(names, ("5", "6", "1", "4"), strict=True))
    assert launcher_variables(monkeypatch, {**STEP, **mpi, **RENDEZVOUS}) == expected


@pytest.mark.parametrize("variables", [{}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}])
def test_set_launcher_environment_without_launcher(monkeypatch, variables):
    """In a shell, and in the shell of a batch script: one rank at any free port."""
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert launcher_variables(monkeypatch, variables) == expected | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", **RENDEZVOUS}, "has not set LOCAL_RANK;"),
        ({"RANK": "0", **RENDEZVOUS}, "has not set WORLD_SIZE and LOCAL_RANK;"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "has not set local ranks"),
    ],
)
def test_set_launcher_environment_refuses_incomplete_variables(monkeypatch, variables, message):
    """Otherwise each process would be rank 0 of 1, or would use the first GPU."""
    with pytest.raises(UserError, match=message):
        launcher_variables(monkeypatch, variables)


def test_set_launcher_environment_missing_rendezvous(monkeypatch):
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        launcher_variables(monkeypatch, STEP)

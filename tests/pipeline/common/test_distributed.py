"""Launcher variables set from those of an srun step."""

import os

import pytest

from pipeline.common.distributed import set_slurm_environment
from pipeline.common.errors import UserError

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
    """The launcher's variables after `set_slurm_environment` with the given environment."""
    for name in [*LAUNCHER, *STEP, "OMPI_COMM_WORLD_RANK"]:
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what set_slurm_environment sets
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_slurm_environment()
    return {name: os.environ[name] for name in LAUNCHER if name in os.environ}


def test_set_slurm_environment_one_rank_per_task(monkeypatch):
    result = launcher_variables(monkeypatch, {**STEP, **RENDEZVOUS})
    assert result == {"RANK": "17", "LOCAL_RANK": "1", "WORLD_SIZE": "19", "LOCAL_WORLD_SIZE": "3", **RENDEZVOUS}


def test_set_slurm_environment_single_task_without_rendezvous(monkeypatch):
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    result = launcher_variables(monkeypatch, {**step, "SLURM_LOCALID": "0"})
    assert (result["RANK"], result["WORLD_SIZE"], result["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},
        {**STEP, "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["batch script", "torchrun in a step", "mpirun in a step"],
)
def test_set_slurm_environment_keeps_variables(monkeypatch, variables):
    unchanged = {name: variables[name] for name in LAUNCHER if name in variables}
    assert launcher_variables(monkeypatch, variables) == unchanged


def test_set_slurm_environment_missing_rendezvous(monkeypatch):
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        launcher_variables(monkeypatch, STEP)

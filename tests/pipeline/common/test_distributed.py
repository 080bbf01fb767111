"""Ranks from a step of srun."""

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
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "20123"}
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def joined(monkeypatch, variables: dict[str, str]) -> dict[str, str]:
    for name in [*OURS, *STEP, "OMPI_COMM_WORLD_RANK"]:
        monkeypatch.setenv(name, "")  # so that what set_slurm_environment sets is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_slurm_environment()
    return {name: os.environ[name] for name in OURS if name in os.environ}


def test_a_task_of_a_step_is_a_rank(monkeypatch):
    found = joined(monkeypatch, {**STEP, **MEETING})
    assert found == {"RANK": "17", "LOCAL_RANK": "1", "WORLD_SIZE": "19", "LOCAL_WORLD_SIZE": "3", **MEETING}


def test_one_task_alone_needs_no_meeting_point(monkeypatch):
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    found = joined(monkeypatch, {**alone, "SLURM_LOCALID": "0"})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},  # a batch script
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},  # torchrun or deepspeed within a step
        {**STEP, "OMPI_COMM_WORLD_RANK": "0"},  # mpirun within a step
    ],
)
def test_elsewhere_nothing_changes(monkeypatch, variables):
    assert joined(monkeypatch, variables) == {name: variables[name] for name in OURS if name in variables}


def test_several_ranks_must_know_where_they_meet(monkeypatch):
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        joined(monkeypatch, STEP)

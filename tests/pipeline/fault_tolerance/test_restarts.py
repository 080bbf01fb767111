"""The record of starts, and a job that restarts in vain."""

import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.fault_tolerance.restarts import MAX_STARTS_WITHOUT_PROGRESS, Starts, in_vain, read_starts


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return Starts(tmp_path, time.monotonic())


def test_a_job_that_gets_nowhere_is_refused(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(MAX_STARTS_WITHOUT_PROGRESS):
        starts.start(40, 100, 2)
    with pytest.raises(UserError, match="job 17 failed 3 times without getting past step 40"):
        starts.start(40, 100, 2)
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # submitted anew
    starts.start(40, 100, 2)


def test_progress_and_signals_clear_the_count(starts: Starts) -> None:
    for step in (0, 0, 10, 10, 20):
        starts.start(step, 100, 2)
    for _ in range(10):  # preempted before its first step, time and again: not the run's fault
        starts.start(20, 100, 2)
        starts.end(20, 75, 0.1)
    assert in_vain(read_starts(starts.path.parent), "17", 20) == 0
    starts.start(20, 100, 2)
    assert in_vain(read_starts(starts.path.parent), "17", 20) == 1


def test_without_a_job_nothing_is_counted(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    for _ in range(10):
        starts.start(5, 100, 1)
    assert [event["job"] for event in read_starts(starts.path.parent)] == [None] * 10


def test_a_line_cut_short_is_left_out(starts: Starts) -> None:
    starts.start(0, 100, 2)
    starts.first_step(1)
    with open(starts.path, "a") as file:
        file.write('{"event": "en')
    assert [event["event"] for event in read_starts(starts.path.parent)] == ["start", "first step"]

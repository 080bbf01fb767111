"""The log of starts and ends, and the crash-loop limit."""

import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.fault_tolerance.restarts import (
    MAX_STARTS_WITHOUT_PROGRESS,
    MAX_STOPS_WITHOUT_PROGRESS,
    RestartLog,
    count_failed_starts,
    read_restart_log,
)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RestartLog:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return RestartLog(tmp_path, time.monotonic())


def test_record_start_refuses_crash_loop(log: RestartLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(MAX_STARTS_WITHOUT_PROGRESS):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        for _ in range(4):  # attempts in an interactive job
            log.record_start(40, 100, 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(UserError, match="job 17 failed 3 times without getting past step 40"):
        log.record_start(40, 100, 2)
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # submitted again
    log.record_start(40, 100, 2)


def test_count_starts_reset_by_progress_and_signals(log: RestartLog) -> None:
    for step in (0, 0, 10, 10, 20):
        log.record_start(step, 100, 2)
    for _ in range(10):  # preempted before its first step, again and again
        log.record_start(20, 100, 2)
        log.record_end(20, 75, 0.1)
    assert count_failed_starts(read_restart_log(log.path.parent), "17", 99, 20) == 0
    log.record_start(20, 100, 2)
    assert count_failed_starts(read_restart_log(log.path.parent), "17", 99, 20) == 1


def test_record_start_refuses_job_that_signals_stop_before_any_step(log: RestartLog) -> None:
    """As if the time limit were shorter than the time to load the model."""
    log.record_start(0, 100, 2)
    log.record_end(20, 75, 0.1)
    for _ in range(MAX_STOPS_WITHOUT_PROGRESS):
        log.record_start(20, 100, 2)
        log.record_end(20, 75, 0.1)
    with pytest.raises(UserError, match=r"stopped job 17 20 times without getting past step 20; .* longer --time"):
        log.record_start(20, 100, 2)
    log.record_end(40, 75, 0.1)
    log.record_start(20, 100, 2)


def test_record_start_unlimited_without_job(log: RestartLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    for _ in range(10):
        log.record_start(5, 100, 1)
    assert [event["job"] for event in read_restart_log(log.path.parent)] == [None] * 10


def test_read_restart_log_skips_truncated_line(log: RestartLog) -> None:
    log.record_start(0, 100, 2)
    log.record_first_step(1)
    with open(log.path, "a") as file:
        file.write('7\n{"event": "en')
    assert [event["event"] for event in read_restart_log(log.path.parent)] == ["start", "first step"]
    log.record_start(1, 100, 2)  # after a full disk, for example
    log.record_end(9, 0, None)
    assert [event["event"] for event in read_restart_log(log.path.parent)] == ["start", "first step", "start", "end"]


def test_event_that_cannot_be_written_is_one_line(log: RestartLog) -> None:
    log.path.mkdir()
    for record in (lambda: log.record_first_step(1), lambda: log.record_end(9, 0, None)):
        with pytest.raises(UserError, match=r"cannot write .*starts\.jsonl: Is a directory; fix the cause and restart"):
            record()


def test_record_start_resets_failed_starts(log: RestartLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """slurm/lib.sh counts failures before this; a start that is refused still counts."""
    file = tmp_path / "failures"
    monkeypatch.setenv("FAILED_STARTS_FILE", str(file))
    for restart in range(MAX_STARTS_WITHOUT_PROGRESS):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        file.write_text("2")
        log.record_start(40, 100, 2)
        assert not file.exists()
    file.write_text("2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(UserError):
        log.record_start(40, 100, 2)
    assert file.exists()

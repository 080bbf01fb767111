"""Who may have an output directory: nobody beside a living run, anybody after a dead one."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.fault_tolerance import lock
from pipeline.fault_tolerance.lock import LOCK, RunLock


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


def leave_lock(directory: Path, **facts: object) -> None:
    content = {"token": "other", "job": None, "host": "elsewhere", "pid": 1} | facts
    (directory / LOCK).write_text(json.dumps(content))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_taken_released_and_taken_again(tmp_path: Path) -> None:
    first = RunLock(tmp_path, tmp_path / "beat", 0.1)
    assert first.held()
    first.release()
    assert not (tmp_path / LOCK).exists()
    assert RunLock(tmp_path, tmp_path / "beat", 0.1).token != first.token


def test_a_living_holder_elsewhere_is_left_alone(tmp_path: Path) -> None:
    leave_lock(tmp_path, job="17")
    beat, stop = tmp_path / "beat", threading.Event()

    def live() -> None:
        while not stop.wait(0.02):
            beat.write_text(str(time.monotonic()))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by job 17, process 1 on elsewhere.*output_dir"):
            RunLock(tmp_path, beat, 5)
    finally:
        stop.set()
        thread.join()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


@pytest.mark.parametrize("clock", [-10_000_000, 10_000_000], ids=["long ago", "in the future"])
def test_a_silent_holder_elsewhere_is_replaced_whatever_its_clock(tmp_path: Path, clock: int) -> None:
    leave_lock(tmp_path)
    beat = tmp_path / "beat"
    beat.write_text("1")
    os.utime(beat, (time.time() + clock,) * 2)
    assert RunLock(tmp_path, beat, 0.2).held()


def test_a_dead_process_of_this_host_is_replaced_without_waiting(tmp_path: Path) -> None:
    leave_lock(tmp_path, host=socket.gethostname(), pid=dead_process())
    begin = time.monotonic()
    assert RunLock(tmp_path, tmp_path / "beat", 60).held()
    assert time.monotonic() - begin < 30


def test_an_earlier_start_of_the_same_job_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave_lock(tmp_path, job="17")
    assert RunLock(tmp_path, tmp_path / "beat", 60).held()


def test_an_unreadable_lock_is_replaced(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"token": "oth')
    assert RunLock(tmp_path, tmp_path / "beat", 60).held()


def test_of_two_that_take_over_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.5)
    (tmp_path / LOCK).write_text("stale")
    outcomes: list[object] = []

    def take() -> None:
        try:
            outcomes.append(RunLock(tmp_path, tmp_path / "beat", 0.1))
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [found for found in outcomes if isinstance(found, RunLock)]
    assert len(outcomes) == 2 and len(winners) == 1 and winners[0].held()
    assert any(isinstance(found, str) and "just taken by" in found for found in outcomes)

"""An output directory belongs to one live run; a new run replaces the lock of a dead one."""

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


def leave_lock(directory: Path, **fields: object) -> None:
    content = {"token": "other", "job": None, "host": "elsewhere", "pid": 1} | fields
    (directory / LOCK).write_text(json.dumps(content))


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lock_acquired_released_and_acquired_again(tmp_path: Path) -> None:
    first = RunLock(tmp_path, tmp_path / "heartbeat", 0.1)
    assert first.is_held()
    first.release()
    assert not (tmp_path / LOCK).exists()
    assert RunLock(tmp_path, tmp_path / "heartbeat", 0.1).token != first.token


def test_lock_refuses_live_holder_on_other_host(tmp_path: Path) -> None:
    leave_lock(tmp_path, job="17")
    heartbeat, stop = tmp_path / "heartbeat", threading.Event()

    def write_heartbeats() -> None:
        while not stop.wait(0.02):
            heartbeat.write_text(str(time.monotonic()))

    thread = threading.Thread(target=write_heartbeats)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by job 17, process 1 on elsewhere.*output_dir"):
            RunLock(tmp_path, heartbeat, 5)
    finally:
        stop.set()
        thread.join()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


@pytest.mark.parametrize("clock", [-10_000_000, 10_000_000], ids=["long ago", "in the future"])
def test_lock_replaces_silent_holder_with_any_clock(tmp_path: Path, clock: int) -> None:
    leave_lock(tmp_path)
    heartbeat = tmp_path / "heartbeat"
    heartbeat.write_text("1")
    os.utime(heartbeat, (time.time() + clock,) * 2)
    assert RunLock(tmp_path, heartbeat, 0.2).is_held()


def test_lock_replaces_dead_local_process_without_waiting(tmp_path: Path) -> None:
    leave_lock(tmp_path, host=socket.gethostname(), pid=dead_process())
    begin = time.monotonic()
    assert RunLock(tmp_path, tmp_path / "heartbeat", 60).is_held()
    assert time.monotonic() - begin < 30


def test_lock_replaces_earlier_start_of_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave_lock(tmp_path, job="17")
    assert RunLock(tmp_path, tmp_path / "heartbeat", 60).is_held()


def test_lock_replaces_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"token": "oth')
    assert RunLock(tmp_path, tmp_path / "heartbeat", 60).is_held()


def test_lock_is_kept_if_deleted_or_unreadable_but_not_if_taken(tmp_path: Path) -> None:
    own = RunLock(tmp_path, tmp_path / "heartbeat", 0.2)
    (tmp_path / LOCK).unlink()
    assert own.keep() and own.is_held()
    (tmp_path / LOCK).write_text('{"tok')
    assert own.keep() and not own.is_held()
    (tmp_path / LOCK).write_text('{"token": "other"}')
    assert not own.keep()
    own.path = tmp_path / ("x" * 256)  # the call that looks for the file fails, as with a stale handle
    assert own.keep()


def test_lock_has_one_winner_after_concurrent_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.5)
    (tmp_path / LOCK).write_text("stale")
    outcomes: list[object] = []

    def acquire() -> None:
        try:
            outcomes.append(RunLock(tmp_path, tmp_path / "heartbeat", 0.1))
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=acquire) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, RunLock)]
    assert len(outcomes) == 2 and len(winners) == 1 and winners[0].is_held()
    assert any(isinstance(outcome, str) and "just taken by" in outcome for outcome in outcomes)


def test_lock_file_without_content_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has created the file, and writes it a moment later."""
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 1.0)
    path, heartbeat = tmp_path / LOCK, tmp_path / "beat"
    path.touch()
    stop = threading.Event()

    def write() -> None:
        time.sleep(0.3)
        path.write_text(json.dumps({"token": "other", "host": "elsewhere", "pid": 1}))
        for beat in range(200):
            heartbeat.write_text(str(beat))
            if stop.wait(0.1):
                return

    other = threading.Thread(target=write)
    other.start()
    try:
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
            RunLock(tmp_path, heartbeat, 5.0)
    finally:
        stop.set()
        other.join()

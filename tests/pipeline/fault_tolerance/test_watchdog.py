"""What a watchdog reports about other ranks, from their files alone; test_faults.py has whole runs."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.fault_tolerance import watchdog
from pipeline.fault_tolerance.watchdog import Watchdog, heartbeat_path


@pytest.fixture(autouse=True)
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)


def make(directory: Path, rank: int, ranks: int = 3, token: str = "now", timeout: float = 60) -> Watchdog:
    (directory / "ranks").mkdir(exist_ok=True)
    return Watchdog(directory, token, rank, ranks, timeout)


def test_describe_suspects_silent_rank(tmp_path: Path) -> None:
    watchdogs = [make(tmp_path, rank) for rank in range(3)]
    for each in watchdogs[:2]:
        each.start()
    watchdogs[2].write_heartbeat()  # once, and never again
    assert watchdogs[0].describe_suspects()[0] == f"rank 2 on {watchdogs[0].host} sends no heartbeat"
    for each in watchdogs[:2]:
        each.close()


def test_describe_suspects_failed_rank(tmp_path: Path) -> None:
    """A rank that has reported its own error and exited is a suspect only if no other rank is silent."""
    watchdogs = [make(tmp_path, rank) for rank in range(3)]
    watchdogs[0].start()
    assert watchdogs[0].record_failure(76, "first") and not watchdogs[1].record_failure(76, "second")
    watchdogs[2].write_heartbeat()
    assert watchdogs[0].describe_suspects()[0] == f"rank 2 on {watchdogs[0].host} sends no heartbeat"
    watchdogs[2].record_failure(76, "third")
    host = watchdogs[0].host
    assert watchdogs[0].describe_suspects()[0] == f"rank 1 on {host} has failed; rank 2 on {host} has failed"
    watchdogs[0].close()


def test_describe_suspects_rank_killed_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is on the host of the killed rank 2, and rank 0 on another one, where nothing was killed."""
    kills = {"a": 3, "b": 5}  # by host, of earlier runs
    watchdogs = []
    for rank, host in enumerate("abb"):
        monkeypatch.setattr(watchdog, "count_oom_kills", lambda host=host: kills[host])
        watchdogs.append(make(tmp_path, rank))
        watchdogs[rank].host = host
    watchdogs[2].write_heartbeat()
    watchdogs[1].start()
    monkeypatch.setattr(watchdog, "count_oom_kills", lambda: kills["b"])
    message = ("rank 2 on b sends no heartbeat", watchdog.RESTART_ADVICE)
    assert watchdogs[0].describe_suspects() == message
    kills["b"] += 1
    message = ("rank 2 on b was probably killed by the kernel for lack of host memory", watchdog.MEMORY_ADVICE)
    assert watchdogs[0].describe_suspects() == message
    watchdogs[1].close()


def test_describe_suspects_slow_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.25)  # a thread of a busy machine may be late
    watchdogs = [make(tmp_path, rank) for rank in range(3)]
    for rank, each in enumerate(watchdogs):
        each.enter_phase(7, "loading data" if rank == 1 else "waiting for all ranks to begin")
        each.start()
    assert watchdogs[0].describe_suspects()[0] == f"rank 1 on {watchdogs[0].host} is at step 7 (loading data)"
    watchdogs[1].enter_phase(7, "waiting for all ranks to begin")
    assert watchdogs[0].describe_suspects()[0] == "all ranks are alive, at step 7 (waiting for all ranks to begin)"
    watchdogs[2].close()  # a rank that has ended is silent, but not a suspect
    assert "rank 2" not in watchdogs[0].describe_suspects()[0]
    for each in watchdogs[:2]:
        each.close()


@pytest.mark.parametrize(
    ("positions", "slow"),
    [
        ([(7, "failed"), (7, "waiting for all ranks to begin"), (7, "waiting for all ranks to begin")], [0]),
        ([(8, "validating"), (8, "waiting for all ranks to begin"), (8, "waiting for all ranks to begin")], [0]),
        ([(5, "waiting for all ranks to begin"), (5, "loading data")], [1]),
        ([(5, "loading data"), (5, "waiting for all ranks to begin")], [0]),
        ([(8, "saving"), (8, "saving"), (8, "forward, backward and update")], [2]),
        ([(5, "forward, backward and update"), (6, "loading data")], []),
    ],
)
def test_describe_suspects_names_slow_ranks(
    positions: list[tuple[int, str]], slow: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank describes them; `failed` is the phase of a rank that reports its own hang."""
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.1)
    watchdogs = [make(tmp_path, rank, ranks=len(positions)) for rank in range(len(positions))]
    for each, position in zip(watchdogs, positions, strict=True):
        each.enter_phase(*position)
        each.start()
    suspects = watchdogs[0].describe_suspects()[0]
    for each in watchdogs:
        each.close()
    assert [rank for rank in range(len(positions)) if f"rank {rank} on" in suspects] == slow
    assert slow or all(f"step {step} ({phase})" in suspects for step, phase in positions)


def test_silence_is_counted_anew_after_a_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system blocks both ranks for longer than a rank may be silent. Rank 0 continues first."""
    monkeypatch.setattr(watchdog, "MAX_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "MAX_STALL_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "exit_now", lambda status: None)
    watchdogs = [make(tmp_path, rank, ranks=2) for rank in range(2)]
    for each, seconds in zip(watchdogs, (0.8, 1.1), strict=True):
        write, stalls = each.write_heartbeat, iter([0, seconds])  # the first one is written by `start`

        def blocked(write: Callable[[], None] = write, stalls: Iterator[float] = stalls) -> None:
            time.sleep(next(stalls, 0))
            write()

        monkeypatch.setattr(each, "write_heartbeat", blocked)
        each.start()
    time.sleep(1.5)
    for each in watchdogs:
        each.close()
    assert watchdogs[0].first_failure() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_no_silence(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mount is not permitted here")
    try:
        each = make(tmp_path, 0)
        each.write_heartbeat()
        with pytest.raises(OSError, match="No space left"), open(tmp_path / "other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        each.enter_phase(7, "validating")
        each.write_heartbeat()
        heartbeat = json.loads(heartbeat_path(tmp_path, 0).read_text())
        assert (heartbeat["beats"], heartbeat["phase"]) == (2, "validating")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_record_failure_keeps_first_of_this_start(tmp_path: Path) -> None:
    old = make(tmp_path, 0, token="before")
    assert old.record_failure(1, "long ago")
    assert make(tmp_path, 1).first_failure() is None
    (tmp_path / "ranks" / "failed.json").unlink()  # as the next start does
    first, second = make(tmp_path, 0), make(tmp_path, 1)
    assert first.record_failure(2, "first") and not second.record_failure(1, "too late")
    failure = second.first_failure()
    assert failure is not None and (failure["status"], failure["message"], failure["rank"]) == (2, "first", 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("case", ["main thread stuck", "next rank silent", "another failed"])
def test_watchdog_ends_process_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    exited, statuses = threading.Event(), []

    def exit_thread(status: int) -> NoReturn:
        """End the watchdog's thread, as the real function would end the process."""
        statuses.append(status)
        exited.set()
        raise SystemExit(status)

    monkeypatch.setattr(watchdog, "exit_now", exit_thread)
    monkeypatch.setattr(watchdog, "EXIT_GRACE_SECONDS", 0.2)
    one, two = make(tmp_path, 0, 2, timeout=0.5), make(tmp_path, 1, 2)
    one.enter_phase(3, "saving")
    two.write_heartbeat()
    stop = threading.Event()

    def keep_main_and_next_rank_alive() -> None:
        while not stop.wait(0.05):
            if case != "main thread stuck":
                one.enter_phase(3, "saving")
            if case != "next rank silent":
                two.write_heartbeat()

    helper = threading.Thread(target=keep_main_and_next_rank_alive)
    helper.start()
    one.start()
    if case == "another failed":
        two.record_failure(2, "a mistake")
    assert exited.wait(20)
    stop.set()
    helper.join()
    assert statuses == [2 if case == "another failed" else 76]
    message = json.loads((tmp_path / "ranks" / "failed.json").read_text())["message"]
    expected = {
        "main thread stuck": "no progress for 0 s at step 3 (saving)",
        "next rank silent": "rank 1 sent no heartbeat for 0 s; rank 0 is at step 3 (saving)",
        "another failed": "a mistake",
    }
    assert message == expected[case]
    assert "_run" in heartbeat_path(tmp_path, 0).with_suffix(".stacks.txt").read_text()

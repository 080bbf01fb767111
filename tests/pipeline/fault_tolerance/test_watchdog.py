"""What a watchdog says of other ranks, from their files alone; test_faults.py has whole runs."""

import json
import threading
from pathlib import Path

import pytest

from pipeline.fault_tolerance import watchdog
from pipeline.fault_tolerance.watchdog import Watchdog, rank_file


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)


def dog(directory: Path, rank: int, ranks: int = 3, token: str = "now", timeout: float = 60) -> Watchdog:
    (directory / "ranks").mkdir(exist_ok=True)
    return Watchdog(directory, token, rank, ranks, timeout)


def test_names_the_silent_rank(tmp_path: Path) -> None:
    dogs = [dog(tmp_path, rank) for rank in range(3)]
    for each in dogs[:2]:
        each.start()
    dogs[2]._beat()  # once, and never again
    assert dogs[0].suspects() == f"rank 2 on {dogs[0].host} gives no sign of life"
    for each in dogs[:2]:
        each.close()


def test_names_the_rank_that_is_behind(tmp_path: Path) -> None:
    dogs = [dog(tmp_path, rank) for rank in range(3)]
    for rank, each in enumerate(dogs):
        each.at(7, "loading data" if rank == 1 else "waiting for all ranks to begin")
        each.start()
    assert dogs[0].suspects() == f"rank 1 on {dogs[0].host} is at step 7 (loading data)"
    dogs[1].at(7, "waiting for all ranks to begin")
    assert dogs[0].suspects() == "all ranks are alive, at step 7 (waiting for all ranks to begin)"
    for each in dogs:
        each.close()


def test_the_first_failure_counts_and_old_ones_do_not(tmp_path: Path) -> None:
    old = dog(tmp_path, 0, token="before")
    assert old.claim(1, "long ago")
    assert dog(tmp_path, 1).failure() is None
    (tmp_path / "ranks" / "failed.json").unlink()  # as the next start does
    first, second = dog(tmp_path, 0), dog(tmp_path, 1)
    assert first.claim(2, "mine") and not second.claim(1, "too late")
    failure = second.failure()
    assert failure is not None and (failure["status"], failure["message"], failure["rank"]) == (2, "mine", 0)


@pytest.mark.parametrize("case", ["main thread stuck", "next rank silent", "another failed"])
def test_ends_the_process_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    ended, statuses = threading.Event(), []

    def leave(status: int) -> None:
        statuses.append(status)
        ended.set()
        one._stop.set()  # the thread ends, as the process would

    monkeypatch.setattr(watchdog, "exit_now", leave)
    monkeypatch.setattr(watchdog, "LEAVE_SECONDS", 0.2)
    one, two = dog(tmp_path, 0, 2, timeout=0.5), dog(tmp_path, 1, 2)
    one.at(3, "saving")
    two._beat()
    keep_up = threading.Event()

    def keep_main_and_neighbour_alive() -> None:
        while not keep_up.wait(0.05):
            if case != "main thread stuck":
                one.at(3, "saving")
            if case != "next rank silent":
                two._beat()

    helper = threading.Thread(target=keep_main_and_neighbour_alive)
    helper.start()
    one.start()
    if case == "another failed":
        two.claim(2, "a mistake")
    assert ended.wait(20)
    keep_up.set()
    helper.join()
    assert statuses == [2 if case == "another failed" else 76]
    message = json.loads((tmp_path / "ranks" / "failed.json").read_text())["message"]
    expected = {
        "main thread stuck": "no progress for 0 s at step 3 (saving)",
        "next rank silent": "a rank gave no sign of life for 0 s at step 3 (saving)",
        "another failed": "a mistake",
    }
    assert message == expected[case]
    assert "_run" in rank_file(tmp_path, 0).with_suffix(".stacks.txt").read_text()

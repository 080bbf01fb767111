"""Selection of this rank's device, and long work on rank 0."""

import threading
from typing import Any

import pytest
import torch

from pipeline.common import distributed
from pipeline.common.distributed import WorkStopped, local_device, run_long_on_rank0
from pipeline.common.errors import UserError
from tests.workers import Workers


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 2)])
def test_local_device_with_all_gpus_or_one_visible(monkeypatch: pytest.MonkeyPatch, visible: int, index: int) -> None:
    """srun --gpus-per-task=1 shows each rank one GPU, which is number 0 for all of them."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert local_device() == torch.device("cuda", index)


def test_local_device_refuses_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="local rank is 2, but it sees 2 GPUs"):
        local_device()


def run_work_until_stopped(group: Any, at_call: int) -> tuple[bool, bool, int]:
    """Stop on rank 2 only, at a call of `is_stopping`. Return whether work began, was stopped, and the heartbeats."""
    distributed.POLL_SECONDS = 0.05
    began, release, heartbeats, calls = threading.Event(), threading.Event(), [], []

    def work() -> None:
        began.set()
        release.wait(60)

    def is_stopping() -> bool:
        calls.append(1)
        return distributed.rank() == 2 and len(calls) >= at_call

    try:
        run_long_on_rank0(work, lambda: heartbeats.append(1), is_stopping)
    except WorkStopped:
        return began.is_set(), True, len(heartbeats)
    finally:
        release.set()
    return began.is_set(), False, len(heartbeats)


def test_run_long_on_rank0_stops_on_all_ranks(workers: Workers) -> None:
    assert workers.run(run_work_until_stopped, 4, 1) == [(False, True, 0)] * 4  # before the work
    assert workers.run(run_work_until_stopped, 4, 3) == [(True, True, 2), *[(False, True, 2)] * 3]

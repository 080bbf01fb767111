"""Selection of this rank's device."""

import pytest
import torch

from pipeline.common.distributed import local_device
from pipeline.common.errors import UserError


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

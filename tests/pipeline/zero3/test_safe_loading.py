"""Files of a checkpoint cannot run code when they are loaded."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from pipeline.zero3.model_state import StateCollector
from pipeline.zero3.safe_loading import weights_only_loading


class Command:
    """An object that runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_weights_only_loading_refuses_code(tmp_path: Path) -> None:
    """DeepSpeed's engine loads with `weights_only=False`, which runs the command outside the block."""
    torch.save({"module": Command(f"touch {tmp_path}/ran")}, tmp_path / "state.pt")
    with weights_only_loading(), pytest.raises(pickle.UnpicklingError):
        StateCollector().load(str(tmp_path / "state.pt"))
    assert not (tmp_path / "ran").exists()
    StateCollector().load(str(tmp_path / "state.pt"))
    assert (tmp_path / "ran").exists()


def test_weights_only_loading_accepts_loss_scaler(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2)
    scaler.cur_scale = 512.0
    torch.save({"loss_scaler": scaler}, tmp_path / "state.pt")
    with weights_only_loading():
        assert StateCollector().load(str(tmp_path / "state.pt"))["loss_scaler"].cur_scale == 512.0

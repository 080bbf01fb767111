"""Progress that the watchdog sees during an optimizer step of many micro-steps, which take long."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.fault_tolerance.watchdog import Watchdog
from pipeline.loss import LossNormalizers, SolarLoss
from pipeline.training.loop import train_step
from pipeline.training.state import TrainState
from pipeline.zero3.engine import ZeroEngine

MICRO_STEPS, SECONDS, TIMEOUT = 8, 400.0, 1800.0


class SlowSteps:
    """Replaces the DeepSpeed engine. A micro-step takes `SECONDS` on a clock that only it moves.

    Attributes:
        silences: for each micro-step, seconds since the last progress of the main thread at its end.
    """

    def __init__(self, watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.watchdog, self.silences = time.monotonic(), watchdog, list[float]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def __call__(self, *_: Any) -> tuple[torch.Tensor, SolarLoss]:
        self.now += SECONDS
        self.silences.append(self.now - self.watchdog._progress[2])
        loss = torch.ones((), requires_grad=True)
        return loss, SolarLoss(loss, *[torch.ones(())] * 8)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        pass

    def fp16_enabled(self) -> bool:
        return False


def test_step_of_many_micro_steps_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(tmp_path, "now", 0, 1, TIMEOUT)
    engine = object.__new__(ZeroEngine)
    engine.ds_engine = SlowSteps(watchdog, monkeypatch)
    engine.device, engine.ranks, engine.group, engine.running_means = torch.device("cpu"), 1, None, None
    engine.vocabulary_shards = SimpleNamespace(vocabulary=lambda: None, sum_losses=lambda loss: loss)
    monkeypatch.setattr(engine, "end_micro_step", lambda: True)
    engine.heartbeat = watchdog.keep_alive
    batch = SimpleNamespace(to=lambda device: None, loss_batch=SimpleNamespace(layout="exchanged"))

    watchdog.enter_phase(1, "forward, backward and update", waited=0.5)
    train_step(engine, [batch] * MICRO_STEPS, 1.0, LossNormalizers(10, 2), TrainState())
    assert MICRO_STEPS * SECONDS > TIMEOUT
    assert engine.ds_engine.silences == pytest.approx([SECONDS] * MICRO_STEPS)
    assert watchdog._progress[:2] == (1, "forward, backward and update") and watchdog._values == {"waited": 0.5}

"""Tests of the loss benchmark on a small input."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from pipeline.benchmarks.loss import main
from pipeline.benchmarks.loss_baselines import LossInputs, LossShape, plain, solar_full_mixture
from pipeline.loss import LossSettings


def test_this_loss_and_plain_torch_compute_the_same_gradients() -> None:
    shape = LossShape(tokens=32, vocab=64, hidden=16, sequence=8)
    settings = LossSettings(softmax_temperature=2.0)
    ours, torchs = (LossInputs.random(shape, torch.float32, "cpu", settings) for _ in range(2))
    solar_full_mixture(ours)
    plain(torchs)
    torch.testing.assert_close(ours.hidden.grad, torchs.hidden.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.accumulator, torchs.weight.grad, rtol=1e-5, atol=1e-7)


def test_rows_name_the_temperature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ["--tokens", "64", "--vocab", "128", "--hidden", "16", "--sequence", "8", "--rounds", "1"]
    options = ["--softmax_temperature", "2", "--only", "solar CE", "--out", str(tmp_path / "loss")]
    monkeypatch.setattr(sys, "argv", ["loss", *sizes, *options])
    main()
    with open(tmp_path / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows] == ["solar", "solar CE", "three products"]
    assert {row["softmax_temperature"] for row in rows} == {"2.0"}

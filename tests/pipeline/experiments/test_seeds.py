"""The processes that run the seeds of an experiment."""

import os
import subprocess
from typing import Any

import pytest
import torch

from pipeline.experiments.__main__ import ExperimentSettings, run_seeds


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1", "0"]), ("4,5", ["4", "5", "4"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b", "GPU-a"])],
)
def test_run_seeds_uses_the_gpus_that_it_may(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    """A GPU's index among the visible ones is not its name in CUDA_VISIBLE_DEVICES."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus: dict[str, str] = {}

    def record(command: list[str], env: dict[str, str]) -> Any:
        gpus[command[command.index("--seeds") + 1]] = env["CUDA_VISIBLE_DEVICES"]
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    run_seeds(ExperimentSettings(), [7, 8, 9], "main")
    assert [gpus[f"[{seed}]"] for seed in (7, 8, 9)] == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible

"""The metrics writer, without a run."""

import json
import time
from pathlib import Path

import pytest
import torch

from pipeline.training.metrics import MetricsWriter


def test_log_excludes_gradient_norms_from_step_time(tmp_path: Path) -> None:
    """Half a second of additional passes does not count in the time and the rate of the step."""
    writer = MetricsWriter(tmp_path, True, 0, 1, flops_per_token=6.0, ranks=1)
    began = time.perf_counter()
    time.sleep(0.5)
    measured = time.perf_counter() - began
    time.sleep(0.02)
    record = {"step": 1, "ce_loss": 1.0, "align_cos": None, "gradient_norms_seconds": measured}
    writer.log(record, num_tokens=100)
    writer.close()
    (written,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0.02 <= written["step_seconds"] < 0.4
    assert abs(written["tokens_per_second"] * written["step_seconds"] - 100) < 1
    assert written["gradient_norms_seconds"] == measured


def test_cpu_ranks_on_a_machine_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory and MFU are not those of the GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    writer = MetricsWriter(tmp_path, True, 0, 1, flops_per_token=6.0, ranks=1)
    writer.log({"step": 1, "ce_loss": 1.0, "align_cos": None}, num_tokens=100)
    writer.close()
    (written,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert written["mfu"] is None and written["peak_memory_gb"] > 0

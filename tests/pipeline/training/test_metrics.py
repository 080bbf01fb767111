"""The metrics writer, without a run."""

import json
import time
from pathlib import Path

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

"""Predictions against real training steps."""

import pytest

from pipeline.benchmarks import plan
from pipeline.benchmarks.plan import case_named, compare, launch
from tests.runs import run_forked_ranks


@pytest.mark.slow
def test_prediction_matches_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check some cases on two ranks against the error bounds of docs/scaling.md."""
    monkeypatch.setattr(plan, "run_ranks", run_forked_ranks)
    names = ["checkpointed", "gathered", "bf16", "cut", "lora"]
    results = launch(2, names, timed_steps=0)
    assert [measurements["case"] for measurements in results] == names
    for measurements in results:
        row = compare(case_named(measurements["case"]), 2, measurements)
        assert abs(row["received_mb_error"]) < 0.05, row
        assert abs(row["calls"] - row["planned_calls"]) <= 1, row
        assert abs(row["states_mb_error"]) < 0.01, row
        assert abs(row["peak_mb_error"]) < 0.10, row

"""Predictions against real training steps."""

import pytest

from pipeline.benchmarks.plan import case_named, compare, launch


@pytest.mark.slow
def test_prediction_matches_real_steps() -> None:
    """Check five cases on two ranks against the error bounds of docs/scaling.md."""
    names = ["checkpointed", "gathered", "bf16", "chunked", "cut"]
    _, results = launch(2, names, timed_steps=0)
    assert [measurements["case"] for measurements in results] == names
    for measurements in results:
        row = compare(case_named(measurements["case"]), 2, measurements)
        assert abs(row["received_mb_error"]) < 0.05, row
        assert abs(row["calls"] - row["planned_calls"]) <= 1, row
        assert abs(row["states_mb_error"]) < 0.01, row
        assert abs(row["peak_mb_error"]) < 0.10, row

"""The fit of the step time to measurements."""

import numpy as np
import pytest

from pipeline.benchmarks.calibrate import StepTimeFit, cpu_device, predicted_seconds
from pipeline.benchmarks.plan import case_named, planned_run


def test_fit_recovers_known_constants() -> None:
    runs = [planned_run(case_named(name), ranks) for name in ("tied", "gathered", "accumulated") for ranks in (1, 4)]
    rates = {ranks: {"flops": 1e11, "bytes_per_s": 1e10} for ranks in (1, 4)}
    module_seconds, hop_seconds = 9e-4, 3e-4
    rows = [{"step_s": predicted_seconds(r, cpu_device(rates[r.ranks], module_seconds, hop_seconds))} for r in runs]
    fitted = StepTimeFit(rows, runs, rates).fit(np.ones(len(rows), bool))
    assert fitted == pytest.approx((module_seconds, hop_seconds), rel=0.04)  # the spacing of the grid

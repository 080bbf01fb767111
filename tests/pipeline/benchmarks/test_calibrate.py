"""The fit of the step time to measurements."""

import numpy as np
import pytest

from pipeline.benchmarks.calibrate import StepTimeFit, cpu_device, predicted_seconds
from pipeline.benchmarks.plan import case_named, planned_run


def test_fit_recovers_known_constants() -> None:
    runs = [planned_run(case_named(name), ranks) for name in ("tied", "gathered", "accumulated") for ranks in (1, 4)]
    rates = [{"core_gflops": 100.0 + 10 * i, "core_gb_s": 10.0} for i in range(len(runs))]
    module_seconds, hop_seconds = 9e-4, 3e-4
    rows = [
        rate | {"step_s": predicted_seconds(run, cpu_device(rate, module_seconds, hop_seconds))}
        for rate, run in zip(rates, runs, strict=True)
    ]
    fitted = StepTimeFit(rows, runs).fit(np.ones(len(rows), bool))
    assert fitted == pytest.approx((module_seconds, hop_seconds), rel=0.04)  # the spacing of the grid

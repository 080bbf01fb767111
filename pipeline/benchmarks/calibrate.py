"""Calibrate the planner's step time for a CPU.

Matrix product throughput and memory bandwidth are measured after each timed step. The host time per module and the
latency of a hop are fitted to the measurements of `pipeline.benchmarks.plan`.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.benchmarks.common import Row
from pipeline.common.hardware import Device
from pipeline.plan.prediction import Cluster, Prediction
from pipeline.plan.workload import PlannedRun

PROBES = 5


def probe() -> dict[str, float]:
    """Measure GFLOP/s of a matrix product and GB/s of an exponential on this rank, with all ranks busy."""
    a, b, x = torch.randn(1024, 256), torch.randn(256, 1024), torch.randn(1 << 20)

    def median_seconds(operation: Callable[[], Any]) -> float:
        times = []
        for _ in range(PROBES):
            started = time.process_time()
            operation()
            times.append(time.process_time() - started)
        return statistics.median(times)

    product, exponential = median_seconds(lambda: a @ b), median_seconds(lambda: torch.exp(x))
    return {"core_gflops": 2 * a.numel() * b.shape[1] / product / 1e9, "core_gb_s": 2 * x.nbytes / exponential / 1e9}


def cpu_device(rates: Row, module_seconds: float, hop_seconds: float) -> Device:
    """Return a CPU core with the rates of `probe` as a device. Its messages go through its own memory."""
    tflops, gb_s = rates["core_gflops"] / 1e3, rates["core_gb_s"]
    return Device(
        name="CPU",
        memory_gib=1,
        bf16_tflops=tflops,
        fp32_tflops=tflops,
        memory_gb_s=gb_s,
        node_gb_s=gb_s,
        network_gb_s=gb_s,
        host_gb_s=gb_s,
        host_memory_gib=1,
        host_memory_gb_s=gb_s,
        attention_copies_mask=True,
        compute_efficiency=1,
        link_efficiency=1,
        layer_seconds=0,
        module_seconds=module_seconds,
        hop_seconds=hop_seconds,
    )


def predicted_seconds(run: PlannedRun, device: Device) -> float:
    """Predict the step time on CPUs. Nothing overlaps, and ranks share cores if there are more ranks than cores."""
    time = Prediction(run, Cluster(1, run.ranks, device)).time
    ranks_per_core = max(1.0, run.ranks / (os.cpu_count() or 1))
    return ranks_per_core * (sum(time.compute.values()) + sum(time.messages.values()))


def with_error(name: str, predicted: float, measured: float, digits: int) -> dict[str, float]:
    """Return {name: measured, planned_name: predicted, name_error: relative error, or 0 if `measured` is 0}."""
    error = round(predicted / measured - 1, 4) if measured else 0.0
    return {name: round(measured, digits), f"planned_{name}": round(predicted, digits), f"{name}_error": error}


class StepTimeFit:
    """Least-squares fit of the seconds per module and per hop.

    The predicted step time is linear in both constants, so three predictions per run determine it.
    """

    def __init__(self, rows: list[Row], runs: list[PlannedRun]) -> None:
        def coefficients(row: Row, run: PlannedRun) -> tuple[float, float, float]:
            base, module, hop = (
                predicted_seconds(run, cpu_device(row, *constants)) for constants in ((0, 0), (1, 0), (0, 1))
            )
            return base, module - base, hop - base

        self.base, self.modules, self.hops = np.array([coefficients(*pair) for pair in zip(rows, runs, strict=True)]).T
        self.measured = np.array([row["step_s"] for row in rows])
        self.module_grid, self.hop_grid = np.meshgrid(np.geomspace(1e-4, 1e-2, 200), np.geomspace(1e-5, 1e-2, 200))

    def fit(self, selected: np.ndarray) -> tuple[float, float]:
        """Return the grid point (seconds per module, seconds per hop) with the smallest sum of squared log errors."""
        squares = np.zeros_like(self.module_grid)
        terms = (self.base, self.modules, self.hops, self.measured)
        for base, modules, hops, seconds in zip(*(term[selected] for term in terms), strict=True):
            squares += np.log((base + modules * self.module_grid + hops * self.hop_grid) / seconds) ** 2
        best = squares.argmin()
        return float(self.module_grid.flat[best]), float(self.hop_grid.flat[best])

    def predict(self, module_seconds: float, hop_seconds: float) -> np.ndarray:
        """Return the predicted seconds of all rows."""
        return self.base + module_seconds * self.modules + hop_seconds * self.hops

    def cross_validate(self, cases: np.ndarray) -> np.ndarray:
        """Predict the rows of each case with constants fitted on all other cases."""
        predicted = np.zeros(len(cases))
        for case in set(cases):
            held_out = cases == case
            predicted[held_out] = self.predict(*self.fit(~held_out))[held_out]
        return predicted


def calibrate(rows: list[Row], runs: list[PlannedRun]) -> None:
    """Fit the time per module and per hop to the measured `step_s`, and add the predicted times to the rows.

    Prints the errors of the fit and of the cross-validation over cases.

    Args:
        rows: measurements, one per run, with the rates of `probe`. Those without `step_s` are left out.
    """
    timed = [i for i, row in enumerate(rows) if row["step_s"] is not None]
    rows, runs = [rows[i] for i in timed], [runs[i] for i in timed]
    fit, cases = StepTimeFit(rows, runs), np.array([row["case"] for row in rows])
    module_seconds, hop_seconds = fit.fit(np.ones(len(rows), bool))
    print(f"fitted: {module_seconds * 1e3:.2f} ms per module, {hop_seconds * 1e3:.2f} ms per hop")
    fitted = fit.predict(module_seconds, hop_seconds)
    predictions = {"step time": fitted}
    if len(set(cases)) > 1:
        predictions["with constants of the other cases"] = fit.cross_validate(cases)
    for name, predicted in predictions.items():
        errors = abs(predicted / fit.measured - 1)
        print(
            f"{name}: {(errors <= 0.25).sum()} of {len(rows)} rows within 25 %, median error {np.median(errors):.1%}, "
            f"largest error {errors.max():.1%}"
        )
    for row, seconds in zip(rows, fitted, strict=True):
        row |= with_error("step_s", float(seconds), row["step_s"], 4)

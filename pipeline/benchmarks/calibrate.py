"""The plan's seconds for a CPU: rates measured alone, two constants fitted on `pipeline.benchmarks.plan`."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.common.hardware import Device
from pipeline.plan.prediction import Cluster, Plan
from pipeline.plan.workload import Run

PROBES = 31


def probe() -> dict[str, float]:
    """What this rank's processor does while all ranks do the same: FLOP/s of a matrix product, bytes/s of exp."""
    a, b, x = torch.randn(1024, 256), torch.randn(256, 1024), torch.randn(1 << 20)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(PROBES):
            started = time.process_time()
            work()
            times.append(time.process_time() - started)
        return statistics.median(times)

    products, passes = seconds(lambda: a @ b), seconds(lambda: torch.exp(x))
    return {"flops": 2 * a.numel() * b.shape[1] / products, "bytes_per_s": 2 * x.nbytes / passes}


def cpu(probed: dict[str, float], module_seconds: float, hop_seconds: float) -> Device:
    """A core of this machine; messages go through its own memory."""
    tflops, gb_s = probed["flops"] / 1e12, probed["bytes_per_s"] / 1e9
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
        attention_copies_mask=True,
        compute_efficiency=1,
        link_efficiency=1,
        module_seconds=module_seconds,
        hop_seconds=hop_seconds,
    )


def planned_seconds(run: Run, device: Device) -> float:
    """Of one step: a rank does everything itself, one thing after the other, and ranks take turns on the cores."""
    found = Plan(run, Cluster(1, run.ranks, device)).time
    turns = max(1.0, run.ranks / (os.cpu_count() or 1))
    return turns * (sum(found.compute.values()) + sum(found.messages.values()))


def beside(name: str, expected: float, measured: float, digits: int) -> dict[str, float]:
    """{name: measured, planned_name: expected, name_error: relative}; an error of 0 where nothing was measured."""
    error = round(expected / measured - 1, 4) if measured else 0.0
    return {name: round(measured, digits), f"planned_{name}": round(expected, digits), f"{name}_error": error}


def calibrate(rows: list[dict[str, Any]], runs: list[Run], probed: dict[int, dict[str, float]]) -> None:
    """Fit the time of a module's hooks and of a hop on all rows, measured `step_s` in each; adds seconds planned.

    Prints also what the rows of each case come to by constants fitted on all other cases.
    """

    def terms(run: Run) -> tuple[float, float, float]:
        """Seconds without both, and for each second of one: `planned_seconds` is linear in them."""
        base, module, hop = (planned_seconds(run, cpu(probed[run.ranks], *s)) for s in ((0, 0), (1, 0), (0, 1)))
        return base, module - base, hop - base

    base, modules, hops = np.array([terms(run) for run in runs]).T
    measured, cases = np.array([row["step_s"] for row in rows]), np.array([row["case"] for row in rows])
    module_grid, hop_grid = np.meshgrid(np.geomspace(1e-4, 1e-2, 200), np.geomspace(1e-5, 1e-2, 200))

    def fit(used: np.ndarray) -> tuple[float, float]:
        squares = np.zeros_like(module_grid)
        for b, m, h, seconds in zip(base[used], modules[used], hops[used], measured[used], strict=True):
            squares += np.log((b + m * module_grid + h * hop_grid) / seconds) ** 2
        return float(module_grid.flat[squares.argmin()]), float(hop_grid.flat[squares.argmin()])

    for ranks, rates in probed.items():
        print(f"{ranks} ranks: {rates['flops'] / 1e9:.0f} GFLOP/s, {rates['bytes_per_s'] / 1e9:.1f} GB/s")
    module, hop = fit(np.ones(len(rows), bool))
    print(f"fitted: {module * 1e3:.2f} ms per module, {hop * 1e3:.2f} ms per hop")
    planned = base + module * modules + hop * hops
    told = {"step time": planned}
    if len(set(cases)) > 1:
        others = told["by constants of the other cases"] = np.zeros(len(rows))
        for case in set(cases):
            left = cases == case
            module, hop = fit(~left)
            others[left] = (base + module * modules + hop * hops)[left]
    for name, seconds in told.items():
        errors = abs(seconds / measured - 1)
        within, half = (errors <= 0.25).sum(), np.median(errors)
        print(
            f"{name}: {within} of {len(rows)} rows within 25 %, half within {half:.1%}, the worst at {errors.max():.1%}"
        )
    for run, row, seconds in zip(runs, rows, planned, strict=True):
        rates = probed[run.ranks]
        row |= beside("step_s", float(seconds), row["step_s"], 4)
        row |= {"core_gflops": round(rates["flops"] / 1e9, 1), "core_gb_s": round(rates["bytes_per_s"] / 1e9, 2)}

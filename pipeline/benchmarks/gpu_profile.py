"""Measure how much of a step a GPU computes, by torch's profiler."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def profile_step(step: Callable[[], object], trace: Path | None = None) -> tuple[float, dict[str, float]]:
    """Profile one step on the current GPU.

    Args:
        step: runs the step.
        trace: file for a Chrome trace of host and GPU. The host is slower while it is recorded.

    Returns:
        The fraction of the step's time in which the GPU runs no kernel, and the milliseconds of each kernel, longest
        first.
    """
    activities = [ProfilerActivity.CUDA] if trace is None else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    kernels = [event for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    milliseconds: dict[str, float] = defaultdict(float)
    for event in kernels:
        milliseconds[event.name] += event.time_range.elapsed_us() / 1e3
    busy = _covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e6
    return 1 - busy / seconds, dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total

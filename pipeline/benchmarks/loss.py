"""Time and extra memory of the loss, forward and backward, next to its peers: rows to CSV and a plot.

    python -m pipeline.benchmarks.loss                                     the reference shape on this machine
    python -m pipeline.benchmarks.loss --sweep                             how cost grows with T, V, d, sequence length
    python -m pipeline.benchmarks.loss --tokens 8192 --hidden 4096 --vocab 131072 --dtype bfloat16 --device cuda

The contestants take turns, so that a slow spell of the machine meets all of them; a row has the median, and the
ratio of each to this loss and to the floor in the same run. Extra memory is what a call needs at its peak beyond
hidden states and weights, gradients included.
"""

import argparse
import csv
import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.benchmarks.loss_baselines import Problem, Shape, contestants
from pipeline.loss import LossSettings

ROOT = Path(__file__).resolve().parents[2]
CALLS_IN_A_ROW = 4
Clock = Callable[[], float]
Row = dict[str, Any]


def machine(device: str) -> str:
    """The processor's or GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor()


def timed(run: Any, problem: Problem, device: str, clock: Clock) -> float:
    """Milliseconds of one call; on a GPU, of one of several in a row, so that it never waits for the first launch."""
    problem.forget()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS_IN_A_ROW):
            problem.forget()
            run(problem)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / CALLS_IN_A_ROW
    begin = clock()
    run(problem)
    return (clock() - begin) * 1e3


def _status(field: str) -> float:
    """A size of this process in MB, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"no {field} in /proc/self/status")


def _extra_memory_cpu(name: str, shape: Shape, dtype: torch.dtype, settings: LossSettings, threads: int) -> float:
    """In a process of its own: peak resident size of one call beyond what it began with, in MB."""
    torch.set_num_threads(threads)
    run = contestants("cpu")[name]
    run(Problem.random(Shape(256, 512, 64, 64), dtype, "cpu"))  # libraries allocate their own at the first call
    problem = Problem.random(shape, dtype, "cpu", settings)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    run(problem)
    return _status("VmHWM") - before


def extra_memory(name: str, shape: Shape, dtype: torch.dtype, device: str, settings: LossSettings) -> float:
    """MB at the peak of one call beyond hidden states and weights."""
    if device == "cpu":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_extra_memory_cpu, (name, shape, dtype, settings, torch.get_num_threads()))
    problem = Problem.random(shape, dtype, device, settings)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestants(device)[name](problem)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    settings: LossSettings,
    rounds: int,
    clock: Clock,
    names: list[str] | None = None,
) -> list[Row]:
    """One row for each contestant; where only some are named, without their memory."""
    runs = {name: run for name, run in contestants(device).items() if names is None or name in names}
    problem = Problem.random(shape, dtype, device, settings)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            milliseconds = timed(run, problem, device, clock)
            if round_:  # the first warms up
                times[name].append(milliseconds)
    del problem
    medians = {name: median(ms) for name, ms in times.items()}
    return [
        asdict(shape)
        | {
            "dtype": str(dtype).removeprefix("torch."),
            "contestant": name,
            "ms": round(medians[name], 2),
            "ms_min": round(min(times[name]), 2),
            "tflops": round(shape.flops / medians[name] / 1e9, 3),
            "extra_mb": None if names else round(extra_memory(name, shape, dtype, device, settings), 1),
            "over_floor": round(medians[name] / medians["three products"], 3),
            "solar_over_it": round(medians["solar"] / medians[name], 3),
            "memory_budget_mb": settings.memory_budget_mb,
            "clock": clock.__name__,
            "rounds": rounds,
            "machine": machine(device),
            "torch": torch.__version__,
        }
        for name in runs
    ]


def sweep(base: Shape) -> list[Shape]:
    """Each of T, V, d and the sequence length varied alone."""
    shapes = [replace(base, tokens=base.tokens * k // 2) for k in (1, 2, 4, 8)]
    shapes += [replace(base, vocab=base.vocab * k // 4) for k in (1, 2, 8)]
    shapes += [replace(base, hidden=base.hidden * k // 2) for k in (1, 4)]
    shapes += [replace(base, sequence=length) for length in (16, 32, 256, base.tokens // 2)]
    return shapes


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[Row], path: Path) -> None:
    """Bars of time and memory for one shape; lines against tokens, vocabulary and so on for a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["contestant"] for row in rows))
    swept = [key for key in asdict(Shape()) if len({row[key] for row in rows}) > 1]
    if not swept:
        figure, axes = plt.subplots(1, 2, figsize=(9, 0.4 * len(names) + 1), sharey=True, layout="constrained")
        for axis, key, label in zip(axes, ("ms", "extra_mb"), ("milliseconds", "extra memory, MB"), strict=True):
            axis.barh(names, [row[key] or 0.0 for row in rows], color="0.6")
            axis.set_xlabel(label)
        axes[0].invert_yaxis()
    else:
        common = {key: max({row[key] for row in rows}, key=[row[key] for row in rows].count) for key in swept}
        figure, axes = plt.subplots(1, len(swept), figsize=(3.2 * len(swept), 3), sharey=True, layout="constrained")
        for axis, key in zip(axes, swept, strict=True):
            for name in names:
                line = [
                    (row[key], row["over_floor"])
                    for row in rows
                    if row["contestant"] == name and all(row[k] == common[k] for k in swept if k != key)
                ]
                axis.plot(*zip(*sorted(line), strict=True), marker="o", label=name)
            axis.set_xscale("log", base=2)
            axis.set_xlabel(key)
        axes[0].set_ylabel("time over three products")
        axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory_budget_mb", type=float, default=LossSettings().memory_budget_mb)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor_time", action="store_true", help="of one CPU thread: for a machine that is shared")
    parser.add_argument("--only", nargs="+", help="contestants; 'solar' and 'three products' always run")
    parser.add_argument("--sweep", action="store_true", help="vary each of T, V, d and the sequence length")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "loss", help="path without .csv, .png")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.processor_time:
        torch.set_num_threads(1)
    base = Shape(args.tokens, args.vocab, args.hidden, args.sequence)
    names = ["solar", "three products", *args.only] if args.only else None
    if args.sweep and names is None:
        names = ["solar", "solar CE", "three products"]
    rows, settings = [], LossSettings(memory_budget_mb=args.memory_budget_mb)
    for shape in sweep(base) if args.sweep else [base]:
        for row in measure(shape, getattr(torch, args.dtype), args.device, settings, args.rounds, clock, names):
            rows.append(row)
            print("  ".join(f"{key}={row[key]}" for key in list(row)[:11]), flush=True)
    write(rows, args.out.with_suffix(".csv"))
    plot(rows, args.out.with_suffix(".png"))
    print(f"{args.out}.csv, {args.out}.png on {rows[0]['machine']}, torch {torch.__version__}")


if __name__ == "__main__":
    main()

"""Measure time and extra memory of the loss and its alternatives, forward and backward. Writes a CSV and a plot.

    python -m pipeline.benchmarks.loss                                     reference shape on this machine
    python -m pipeline.benchmarks.loss --sweep                             vary T, V, d and the sequence length
    python -m pipeline.benchmarks.loss --tokens 8192 --hidden 4096 --vocab 131072 --dtype bfloat16 --device cuda

Variants are timed in turn, so that a slow phase of the machine affects all of them. Each row contains the median time
and its ratio to this loss and to the lower bound (three matrix products) in the same run. Extra memory is the peak of
one call minus the hidden states and weights; it includes gradients.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from pipeline.benchmarks.common import OUTPUT, Row, machine, print_row, pyplot, write_csv
from pipeline.benchmarks.loss_baselines import LossInputs, LossShape, LossVariant, loss_variants
from pipeline.loss import LossSettings

CALLS_IN_A_ROW = 4
HEAD_START = 50_000_000  # cycles of a GPU, about 30 ms


@dataclass(frozen=True)
class MeasurementSettings:
    """How to measure a shape.

    Attributes:
        rounds: timed calls of each variant.
        clock: returns seconds; not used on a GPU.
        names: variants to time without measuring memory; None to time and measure all variants.
    """

    dtype: torch.dtype
    device: str
    loss: LossSettings
    rounds: int
    clock: Callable[[], float]
    names: list[str] | None = None


def time_call(run: LossVariant, inputs: LossInputs, device: str, clock: Callable[[], float]) -> float:
    """Return the milliseconds of one call.

    On a GPU, average over consecutive calls, and keep the GPU busy while the host launches the first one. The time is
    then that of the GPU, as in training steps whose host is ahead of it.
    """
    inputs.clear_grads()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        for _ in range(CALLS_IN_A_ROW):
            inputs.clear_grads()
            run(inputs)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / CALLS_IN_A_ROW
    begin = clock()
    run(inputs)
    return (clock() - begin) * 1e3


def _process_memory_mb(field: str) -> float:
    """Read a field of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status: no field {field}")


def _extra_memory_cpu(name: str, shape: LossShape, dtype: torch.dtype, settings: LossSettings, threads: int) -> float:
    """Return by how much one call raises the peak resident size, in MB. Runs in a separate process."""
    torch.set_num_threads(threads)
    run = loss_variants("cpu")[name]
    run(LossInputs.random(LossShape(256, 512, 64, 64), dtype, "cpu"))  # libraries allocate in their first call
    inputs = LossInputs.random(shape, dtype, "cpu", settings)
    before = _process_memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run(inputs)
    return _process_memory_mb("VmHWM") - before


def extra_memory(name: str, shape: LossShape, settings: MeasurementSettings) -> float:
    """Return the peak memory of one call minus hidden states and weights, in MB."""
    if settings.device == "cpu":
        arguments = (name, shape, settings.dtype, settings.loss, torch.get_num_threads())
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_extra_memory_cpu, arguments)
    inputs = LossInputs.random(shape, settings.dtype, settings.device, settings.loss)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_variants(settings.device)[name](inputs)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure_variants(shape: LossShape, settings: MeasurementSettings) -> list[Row]:
    """Measure all selected variants on one shape and return one CSV row for each."""
    device, names = settings.device, settings.names
    variants = {name: run for name, run in loss_variants(device).items() if names is None or name in names}
    inputs = LossInputs.random(shape, settings.dtype, device, settings.loss)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(settings.rounds + 1):
        for name, run in variants.items():
            milliseconds = time_call(run, inputs, device, settings.clock)
            if round_:  # the first round is a warm-up
                times[name].append(milliseconds)
    del inputs
    medians = {name: median(ms) for name, ms in times.items()}
    return [
        asdict(shape)
        | {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "contestant": name,
            "ms": round(medians[name], 2),
            "ms_min": round(min(times[name]), 2),
            "tflops": round(shape.flops / medians[name] / 1e9, 3),
            "extra_mb": None if names else round(extra_memory(name, shape, settings), 1),
            "over_floor": round(medians[name] / medians["three products"], 3),
            "solar_over_it": round(medians["solar"] / medians[name], 3),
            "memory_budget_mb": settings.loss.memory_budget_mb,
            "softmax_temperature": settings.loss.softmax_temperature,
            "clock": settings.clock.__name__,
            "rounds": settings.rounds,
            "machine": machine(device),
            "torch": torch.__version__,
        }
        for name in variants
    ]


def sweep(base: LossShape) -> list[LossShape]:
    """Return the shapes that vary one of T, V, d and the sequence length at a time."""
    shapes = [replace(base, tokens=base.tokens * k // 2) for k in (1, 2, 4, 8)]
    shapes += [replace(base, vocab=base.vocab * k // 4) for k in (1, 2, 8)]
    shapes += [replace(base, hidden=base.hidden * k // 2) for k in (1, 4)]
    shapes += [replace(base, sequence=length) for length in (16, 32, 256, base.tokens // 2)]
    return shapes


def plot(rows: list[Row], path: Path) -> None:
    """Plot time and memory: bars for one shape, or one line plot per varied size for a sweep."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    swept = [key for key in asdict(LossShape()) if len({row[key] for row in rows}) > 1]
    if not swept:
        figure, axes = pyplot().subplots(1, 2, figsize=(9, 0.4 * len(names) + 1), sharey=True, layout="constrained")
        for axis, key, label in zip(axes, ("ms", "extra_mb"), ("milliseconds", "extra memory, MB"), strict=True):
            axis.barh(names, [row[key] or 0.0 for row in rows], color="0.6")
            axis.set_xlabel(label)
        axes[0].invert_yaxis()
    else:
        common = {key: max({row[key] for row in rows}, key=[row[key] for row in rows].count) for key in swept}
        figure, axes = pyplot().subplots(
            1, len(swept), figsize=(3.2 * len(swept), 3), sharey=True, layout="constrained"
        )
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
    for name, default in asdict(LossShape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory_budget_mb", type=float, default=LossSettings().memory_budget_mb)
    parser.add_argument("--softmax_temperature", type=float, default=LossSettings().softmax_temperature)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--processor_time", action="store_true", help="measure CPU time on one thread, for a shared machine"
    )
    parser.add_argument("--only", nargs="+", help="variants to run; 'solar' and 'three products' always run")
    parser.add_argument("--sweep", action="store_true", help="vary each of T, V, d and the sequence length")
    parser.add_argument("--out", type=Path, default=OUTPUT / "loss", help="output path without .csv and .png")
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
    names = ["solar", "three products", *args.only] if args.only else None
    if args.sweep and names is None:
        names = ["solar", "solar CE", "three products"]
    settings = MeasurementSettings(
        dtype=getattr(torch, args.dtype),
        device=args.device,
        loss=LossSettings(memory_budget_mb=args.memory_budget_mb, softmax_temperature=args.softmax_temperature),
        rounds=args.rounds,
        clock=time.process_time if args.processor_time else time.perf_counter,
        names=names,
    )
    base = LossShape(args.tokens, args.vocab, args.hidden, args.sequence)
    rows: list[Row] = []
    for shape in sweep(base) if args.sweep else [base]:
        for row in measure_variants(shape, settings):
            rows.append(row)
            print_row(row, 11)
    write_csv(rows, args.out.with_suffix(".csv"))
    plot(rows, args.out.with_suffix(".png"))
    print(f"{args.out}.csv, {args.out}.png on {rows[0]['machine']}, torch {torch.__version__}")


if __name__ == "__main__":
    main()

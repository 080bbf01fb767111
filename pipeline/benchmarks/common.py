"""Shared helpers for the benchmarks: random packed rows, local ranks, CSV files, plots."""

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from data_prep.shards.format import IGNORE, PIVOT, TRANSLATION, PackedRow
from pipeline.common import distributed
from pipeline.common.launcher import free_port
from pipeline.data.micro_batch import MicroBatch, collate, take_part

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "runs" / "bench"  # default folder for results

Row = dict[str, Any]  # of a CSV file


def processor_name() -> str:
    """Return the CPU model of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> str:
    """Return the GPU name, or the CPU name with the number of threads. `device` is "cuda" or "cpu"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV with the columns of the first row. Create the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_row(row: Row, columns: int) -> None:
    """Print the first columns of a row as key=value."""
    print("  ".join(f"{key}={row[key]}" for key in list(row)[:columns]), flush=True)


def pyplot() -> ModuleType:
    """Return matplotlib.pyplot with a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def memory_in_use_gb() -> float:
    """Return the memory in use in GiB: allocated on the GPU, or resident on a CPU. Resets the peak on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def random_batch(
    vocab_size: int, rows: int, tokens: int, sequence_length: int, step: int, parts: int = 1
) -> MicroBatch:
    """Return a micro-batch of random sequence pairs that differs on each rank and step.

    Two thirds of its tokens are target tokens.

    Args:
        rows: number of packed rows.
        tokens: length of a row, rounded down to whole sequences.
        parts: number of consecutive ranks that share the rows.
    """
    group, index = divmod(distributed.rank(), parts)
    generator = np.random.default_rng([step, group])
    count = tokens // sequence_length
    ids = generator.integers(0, vocab_size, (rows, count * sequence_length)).astype(np.int32)
    is_target = np.arange(count * sequence_length) % sequence_length >= sequence_length // 3
    packed = [
        PackedRow(
            row,
            np.where(is_target, row, IGNORE).astype(np.int32),
            np.full(count, sequence_length, np.int32),
            [f"{b}-{i // 2}" for i in range(count)],
            ["en" if i % 2 == 0 else "sw" for i in range(count)],
            [PIVOT if i % 2 == 0 else TRANSLATION for i in range(count)],
        )
        for b, row in enumerate(ids)
    ]
    return take_part(collate(packed, ["en", "sw"], 0, None, parts), index, parts)


@contextmanager
def persistent_parameters_gathered_one_by_one() -> Iterator[None]:
    """Make engines built in this context gather each persistent parameter in its own collective, as DeepSpeed does."""
    with mock.patch("pipeline.zero3.engine.gather_together_after_steps"):
        yield


@contextmanager
def hooks_on_every_module() -> Iterator[None]:
    """Make engines built in this context fetch and release parameters module by module, as DeepSpeed does."""
    with mock.patch("pipeline.zero3.engine.set_z3_leaf_modules"):
        yield


def run_ranks(ranks: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run `python ARGUMENTS` on several ranks of this machine, on CPUs if there is no GPU.

    Returns:
        The JSON objects that rank 0 prints, one per line. Other output is discarded, except for standard error.

    Raises:
        RuntimeError: a rank fails.
    """
    port = free_port()
    processes = []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in variables.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"PYTHONWARNINGS": "ignore"}
        if not torch.cuda.is_available():
            threads = max(1, (os.cpu_count() or 1) // ranks)
            environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    outputs = [process.communicate()[0] for process in processes]
    if statuses := {rank: p.returncode for rank, p in enumerate(processes) if p.returncode}:
        raise RuntimeError(f"python {' '.join(arguments[:2])} failed; exit status by rank: {statuses}")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith('{"')]

"""What the benchmarks of training share: random packed rows, and ranks of this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_prep.shards.format import IGNORE, PIVOT, TRANSLATION, PackedRow
from pipeline.common import distributed
from pipeline.data.micro_batch import MicroBatch, collate

ROOT = Path(__file__).resolve().parents[2]


def random_batch(vocab_size: int, rows: int, tokens: int, sequence: int, step: int) -> MicroBatch:
    """Packed rows of pairs of sequences, two thirds of each supervised, different on every rank and step."""
    generator = np.random.default_rng([step, distributed.rank()])
    count = tokens // sequence
    ids = generator.integers(0, vocab_size, (rows, count * sequence)).astype(np.int32)
    is_target = np.arange(count * sequence) % sequence >= sequence // 3
    packed = [
        PackedRow(
            row,
            np.where(is_target, row, IGNORE).astype(np.int32),
            np.full(count, sequence, np.int32),
            [f"{b}-{i // 2}" for i in range(count)],
            ["en" if i % 2 == 0 else "sw" for i in range(count)],
            [PIVOT if i % 2 == 0 else TRANSLATION for i in range(count)],
        )
        for b, row in enumerate(ids)
    ]
    return collate(packed, ["en", "sw"], 0)


def run_ranks(ranks: int, words: Sequence[str]) -> list[str]:
    """`python WORDS` on ranks of this machine, on CPUs where there is no GPU; the lines of rank 0's output.

    Raises RuntimeError where a rank fails; what it wrote to standard error is seen.
    """
    port = distributed.free_port()
    processes = []
    for rank in range(ranks):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in facts.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"PYTHONWARNINGS": "ignore"}
        if not torch.cuda.is_available():
            threads = max(1, (os.cpu_count() or 1) // ranks)
            environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, *words]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    outputs = [process.communicate()[0] for process in processes]
    if statuses := {rank: p.returncode for rank, p in enumerate(processes) if p.returncode}:
        raise RuntimeError(f"{' '.join(words[:2])}: statuses by rank {statuses}")
    return outputs[0].splitlines()

"""Bytes and time of the loss on several gloo ranks of this machine, both ways to divide it: rows to CSV and a plot.

    python -m pipeline.benchmarks.ranks

For 1, 2 and 4 ranks and growing numbers of positions, what a rank receives is counted at every collective and put
next to the formula of `pipeline.loss.traffic`. The formula also says at how many positions the two ways send alike.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.benchmarks.loss import ROOT, Row, machine, write
from pipeline.common.distributed import free_port
from pipeline.loss import LossBatch, LossNormalizers, LossSettings, Vocabulary, VocabularyShard, solar_loss
from pipeline.loss.settings import Head
from pipeline.loss.traffic import Traffic

VOCAB, HIDDEN, SEQUENCE = 4096, 64, 32
TOKENS = (256, 1024, 4096, 8192, 16384)


class Watch(TorchDispatchMode):
    """Every operation inside: bytes this rank receives in collectives, and the largest tensor in sight.

    Attributes:
        received: bytes, an all-reduce counted as on a ring. calls: collectives and received messages.
        largest: elements of the largest storage.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.received, self.calls, self.largest = 0.0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        if func.namespace == "c10d":
            self.received += self._bytes(func._opname, args)
            self.calls += func._opname != "send"
        return result

    def _bytes(self, name: str, args: Any) -> float:
        sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if name == "_allgather_base_":
            return sizes[0] - sizes[1]
        if name == "_reduce_scatter_base_":
            return sizes[1] - sizes[0]
        if name == "allreduce_":
            return 2 * (self.ranks - 1) / self.ranks * sizes[0]
        if name == "alltoall_base_":
            rows = args[3] or [1] * self.ranks
            return sizes[0] * (1 - rows[self.rank] / max(1, sum(rows)))
        if name == "recv_":
            return sizes[0]
        return 0.0


def problem(rank: int, ranks: int, tokens: int) -> tuple[Tensor, LossBatch, Vocabulary, LossNormalizers]:
    """Pairs of sequences on each rank, a tied vocabulary over all of them."""
    generator = torch.Generator().manual_seed(rank)
    sequences = torch.arange(tokens // SEQUENCE)
    loss_batch = LossBatch(
        targets=torch.randint(0, VOCAB, (tokens,), generator=generator),
        lengths=torch.full_like(sequences, SEQUENCE),
        pivot=sequences // 2 * 2,
        problem_id=sequences // 2 + 10**6 * rank,
        language=sequences % 2,
    )
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    rows = VOCAB // ranks
    weight = torch.randn(rows, HIDDEN, generator=generator)
    shard = VocabularyShard(weight, rank * rows, torch.zeros_like(weight))
    normalizers = LossNormalizers(float(tokens * ranks), tokens / SEQUENCE / 2 * ranks)
    return hidden, loss_batch, Vocabulary(VOCAB, shard, shard), normalizers


def expected(ranks: int, tokens: int) -> Traffic:
    """The counts of `problem` where everything is in one buffer."""
    sequences = tokens // SEQUENCE * ranks
    return Traffic(
        ranks=ranks,
        vocab=VOCAB,
        hidden=HIDDEN,
        element_size=4,
        positions=tokens * ranks,
        padded=tokens,
        subchunks=1,
        recomputed=0,
        padded_recomputed=0,
        sequences=sequences,
        requires_grad=sequences // 2,
    )


def count(
    group: dist.ProcessGroup, tokens: int, head: Head, repeats: int = 1, memory_budget_mb: float = 1e6
) -> tuple[float, int, float]:
    """Bytes received, elements of the largest tensor, median milliseconds, on this rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    hidden, loss_batch, vocabulary, normalizers = problem(rank, ranks, tokens)
    settings = LossSettings(head=head, memory_budget_mb=memory_budget_mb)
    with Watch(rank, ranks) as watch:
        solar_loss(hidden, loss_batch, vocabulary, settings, 1.0, normalizers, 2, None, group).loss.backward()
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        begin = time.perf_counter()
        solar_loss(hidden, loss_batch, vocabulary, settings, 1.0, normalizers, 2, None, group).loss.backward()
        times.append((time.perf_counter() - begin) * 1e3)
    return watch.received, watch.largest, median(times)


def _rank(rank: int, ranks: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    for tokens in TOKENS:
        heads: tuple[Head, ...] = ("vocab_parallel", "gathered")
        for head in heads:
            received, _, milliseconds = count(group, tokens, head, repeats=5)
            if rank == 0:
                results.put((ranks, tokens, head, received, milliseconds))
    dist.destroy_process_group()


def crossing(ranks: int) -> float:
    """Positions of each rank at which both ways receive as much, by the formula."""
    return next(t for t in range(SEQUENCE, 10**6, SEQUENCE) if _gathered_wins(ranks, t))


def _gathered_wins(ranks: int, tokens: int) -> bool:
    traffic = expected(ranks, tokens)
    return traffic.gathered < traffic.vocab_parallel


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, ranks in zip(axes, (2, 4), strict=True):
        for head, colour in (("vocab_parallel", "C0"), ("gathered", "C1")):
            mine = [row for row in rows if row["ranks"] == ranks and row["head"] == head]
            tokens = [row["tokens"] for row in mine]
            axis.plot(tokens, [row["received_mb"] for row in mine], "o", color=colour, label=f"{head}, counted")
            axis.plot(tokens, [row["formula_mb"] for row in mine], "-", color=colour, label="formula")
        axis.axvline(crossing(ranks), color="0.7", linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="positions per rank", title=f"{ranks} ranks")
    axes[0].set_ylabel("MB received per rank and step")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "ranks", help="path without .csv, .png")
    out = parser.parse_args().out
    rows: list[Row] = []
    for ranks in (1, 2, 4):
        port = free_port()
        results: Any = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_rank, args=(ranks, port, results), nprocs=ranks)
        while not results.empty():
            size, tokens, head, received, milliseconds = results.get()
            formula = getattr(expected(size, tokens), head)
            rows.append(
                {
                    "ranks": size,
                    "tokens": tokens,
                    "vocab": VOCAB,
                    "hidden": HIDDEN,
                    "head": head,
                    "received_mb": round(received / 1e6, 4),
                    "formula_mb": round(formula / 1e6, 4) if size > 1 else 0.0,
                    "ms": round(milliseconds, 2),
                    "machine": machine("cpu"),
                    "torch": torch.__version__,
                }
            )
            print("  ".join(f"{key}={rows[-1][key]}" for key in list(rows[-1])[:8]), flush=True)
    for ranks in (2, 4):
        print(f"{ranks} ranks: the formula has both ways alike at {crossing(ranks)} positions per rank")
    write(rows, out.with_suffix(".csv"))
    plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()

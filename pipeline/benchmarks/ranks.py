"""Measure the communication volume and runtime of the loss on several gloo ranks, for both LM head implementations.

    python -m pipeline.benchmarks.ranks

The heads are the vocabulary-parallel head and the ring head (`gathered`). For 1, 2 and 4 ranks and increasing numbers
of target tokens, the bytes that a rank receives are counted at every collective and compared with the formula of
`pipeline.loss.traffic`. The formula also gives the break-even point: the number of target
tokens above which the ring head receives fewer bytes. Writes a CSV and a plot.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.benchmarks.common import OUTPUT, Row, machine, print_row, pyplot, run_ranks, write_csv
from pipeline.loss import LossBatch, LossNormalizers, LossSettings, Vocabulary, VocabularyShard, solar_loss
from pipeline.loss.head_choice import HEADS
from pipeline.loss.settings import Head
from pipeline.loss.traffic import Traffic
from pipeline.plan.storage_tracker import tensors_in

VOCAB, HIDDEN, SEQUENCE_LENGTH = 4096, 64, 32
TOKENS = (256, 1024, 4096, 8192, 16384)


class CollectiveCounter(TorchDispatchMode):
    """Count the collectives inside the context and the bytes that this rank receives in them.

    Args:
        per_node: number of consecutive ranks that count as a node; None if all ranks do.

    Attributes:
        received: bytes; an all-reduce is counted as a ring all-reduce.
        between_nodes: those that come from ranks of other nodes, as if each pair of ranks communicated directly.
        calls: number of collectives and received messages.
        largest: number of elements of the largest storage that any operation reads or writes.
    """

    def __init__(self, per_node: int | None = None) -> None:
        super().__init__()
        self.per_node = per_node
        self.received, self.between_nodes, self.calls, self.largest = 0.0, 0.0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(args, kwargs, result):
            self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        if func.namespace == "c10d":
            by_rank = self._received_by_rank(func._opname, args)
            self.received += sum(by_rank.values())
            if self.per_node is not None:
                node = dist.get_rank() // self.per_node
                self.between_nodes += sum(size for rank, size in by_rank.items() if rank // self.per_node != node)
            self.calls += func._opname != "send"
        return result

    def _received_by_rank(self, name: str, args: Any) -> dict[int, float]:
        """Return the bytes received from each other rank."""
        sizes = [tensor.nbytes for tensor in tensors_in(args)]
        boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        if not boxed:
            return {}
        group = dist.distributed_c10d._resolve_process_group(dist.ProcessGroup.unbox(boxed[0]).group_name)
        ranks = dist.get_process_group_ranks(group)
        others = [(i, rank) for i, rank in enumerate(ranks) if rank != dist.get_rank()]
        if name == "alltoall_base_":
            rows = args[3] or [1] * len(ranks)
            return {rank: sizes[0] * rows[i] / max(1, sum(rows)) for i, rank in others}
        total = {
            "_allgather_base_": sizes[0] * (len(ranks) - 1) / len(ranks),
            "_reduce_scatter_base_": sizes[-1] * (len(ranks) - 1) / len(ranks),
            "allreduce_": 2 * (len(ranks) - 1) / len(ranks) * sizes[0],
        }.get(name, 0.0)
        return {rank: total / len(others) for _, rank in others}


def random_inputs(rank: int, ranks: int, tokens: int) -> tuple[Tensor, LossBatch, Vocabulary, LossNormalizers]:
    """Return random hidden states, sequence pairs and the tied vocabulary shard of this rank, and the normalizers."""
    generator = torch.Generator().manual_seed(rank)
    sequences = torch.arange(tokens // SEQUENCE_LENGTH)
    loss_batch = LossBatch(
        targets=torch.randint(0, VOCAB, (tokens,), generator=generator),
        lengths=torch.full_like(sequences, SEQUENCE_LENGTH),
        pivot=sequences // 2 * 2,
        problem_id=sequences // 2 + 10**6 * rank,
        language=sequences % 2,
    )
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    rows = VOCAB // ranks
    weight = torch.randn(rows, HIDDEN, generator=generator)
    shard = VocabularyShard(weight, rank * rows, torch.zeros_like(weight))
    normalizers = LossNormalizers(float(tokens * ranks), tokens / SEQUENCE_LENGTH / 2 * ranks)
    return hidden, loss_batch, Vocabulary(VOCAB, shard, shard), normalizers


def expected_traffic(ranks: int, tokens: int, top_k: int | None = LossSettings.top_k) -> Traffic:
    """Return the traffic for `random_inputs` in a single chunk. `tokens` is the number per rank."""
    sequences = tokens // SEQUENCE_LENGTH * ranks
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
        top_k=top_k,
    )


def measure_traffic(
    group: dist.ProcessGroup,
    tokens: int,
    head: Head,
    repeats: int = 1,
    memory_budget_mb: float = 1e6,
    top_k: int | None = LossSettings.top_k,
) -> tuple[float, int, float]:
    """Return the received bytes, the elements of the largest tensor, and the median milliseconds on this rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    hidden, loss_batch, vocabulary, normalizers = random_inputs(rank, ranks, tokens)
    settings = LossSettings(head=head, memory_budget_mb=memory_budget_mb, top_k=top_k)
    with CollectiveCounter() as counter:
        solar_loss(hidden, loss_batch, vocabulary, settings, 1.0, normalizers, 2, None, group).loss.backward()
    times = []
    for _ in range(repeats):
        dist.barrier(group)
        begin = time.perf_counter()
        solar_loss(hidden, loss_batch, vocabulary, settings, 1.0, normalizers, 2, None, group).loss.backward()
        times.append((time.perf_counter() - begin) * 1e3)
    return counter.received, counter.largest, median(times)


def run_rank() -> None:
    """Measure traffic and runtime for every token count and both heads. Rank 0 prints a JSON line for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    for tokens in TOKENS:
        for head in HEADS:
            received, _, milliseconds = measure_traffic(group, tokens, head, repeats=5)
            if dist.get_rank() == 0:
                result = {"tokens": tokens, "head": head, "received": received, "ms": milliseconds}
                print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def crossover_tokens(ranks: int) -> int:
    """Return the smallest number of target tokens per rank at which the ring head needs less communication.

    At this number the ring head (`gathered`) is predicted to receive fewer bytes than the vocabulary-parallel head.
    """
    for tokens in range(SEQUENCE_LENGTH, 10**6, SEQUENCE_LENGTH):
        traffic = expected_traffic(ranks, tokens)
        if traffic.gathered < traffic.vocab_parallel:
            return tokens
    raise ValueError(f"the ring head never receives fewer bytes on {ranks} ranks")


def plot(rows: list[Row], path: Path) -> None:
    """Plot measured and predicted bytes against target tokens, for 2 and 4 ranks."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, ranks in zip(axes, (2, 4), strict=True):
        for head, color in zip(HEADS, ("C0", "C1"), strict=True):
            selected = [row for row in rows if row["ranks"] == ranks and row["head"] == head]
            tokens = [row["tokens"] for row in selected]
            axis.plot(tokens, [row["received_mb"] for row in selected], "o", color=color, label=f"{head}, counted")
            axis.plot(tokens, [row["formula_mb"] for row in selected], "-", color=color, label="formula")
        axis.axvline(crossover_tokens(ranks), color="0.7", linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="target tokens per rank", title=f"{ranks} ranks")
    axes[0].set_ylabel("MB received per rank and step")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT / "ranks", help="output path without .csv and .png")
    parser.add_argument("--run_rank", action="store_true", help=argparse.SUPPRESS)  # set in child processes
    args = parser.parse_args()
    if args.run_rank:
        run_rank()
        return
    rows: list[Row] = []
    for ranks in (1, 2, 4):
        for result in run_ranks(ranks, ["-m", "pipeline.benchmarks.ranks", "--run_rank"]):
            formula = getattr(expected_traffic(ranks, result["tokens"]), result["head"])
            rows.append(
                {
                    "ranks": ranks,
                    "tokens": result["tokens"],
                    "vocab": VOCAB,
                    "hidden": HIDDEN,
                    "head": result["head"],
                    "received_mb": round(result["received"] / 1e6, 4),
                    "formula_mb": round(formula / 1e6, 4) if ranks > 1 else 0.0,
                    "ms": round(result["ms"], 2),
                    "machine": machine("cpu"),
                    "torch": torch.__version__,
                }
            )
            print_row(rows[-1], 8)
    for ranks in (2, 4):
        print(f"{ranks} ranks: the ring head should receive fewer bytes from {crossover_tokens(ranks)} tokens per rank")
    write_csv(rows, args.out.with_suffix(".csv"))
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

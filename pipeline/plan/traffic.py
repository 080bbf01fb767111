"""Estimate the bytes that a rank receives in one optimizer step, by purpose and by link.

There are two communication patterns:

    ring        The data of a collective passes from rank to rank. Ranks of the same node are neighbors, and NCCL builds
                rings through all network cards of a node, so each card carries 1/g of the data that enters the node.
    all-to-all  Each pair of ranks communicates directly.

Shape letters: R ranks, g ranks of a node, U distinct token ids of a micro-batch, d hidden size.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.loss.head_time import ring_between_nodes
from pipeline.plan.memory import reduce_scatters
from pipeline.plan.workload import PlannedRun

Pattern = Literal["ring", "all-to-all"]
Phase = Literal["layers", "loss", "alone"]


@dataclass(frozen=True)
class Transfer:
    """One kind of communication in an optimizer step.

    Attributes:
        received: bytes that each rank receives, on average.
        calls: number of collectives.
        hops: number of consecutive messages: R - 1 for a collective on a ring, twice that for an all-reduce.
        pattern: how the ranks communicate.
        phase: computation that it can overlap with: the layers, the loss, or none.
        group: number of consecutive ranks that communicate; None for all.
    """

    name: str
    received: float
    calls: float
    hops: float
    pattern: Pattern
    phase: Phase
    group: int | None = None

    def between_nodes(self, ranks: int, per_node: int) -> float:
        """Return the received bytes that come from other nodes, averaged over the ranks of a node."""
        ranks = self.group or ranks
        if ranks <= per_node:
            return 0.0
        if self.pattern == "all-to-all":
            return self.received * (ranks - per_node) / (ranks - 1)
        return ring_between_nodes(self.received, ranks, per_node)


def estimate_transfers(run: PlannedRun) -> list[Transfer]:
    """Estimate all communication of one optimizer step. Of scalar all-reduces, only the hops count."""
    if run.ranks == 1:
        return []
    micro_steps, e = run.gradient_accumulation_steps, run.element_size
    others, fraction = run.ranks - 1, (run.ranks - 1) / run.ranks
    reductions = reduce_scatters(run)
    reduced = run.partition_elements(tuple(size for _, sizes in reductions for size in sizes)) * run.ranks
    persistent = run.partition_elements(run.persistent_sizes) * run.ranks
    # Scalar all-reduces: the loss normalizers, a norm for each optimizer group, and with fp16 the overflow check.
    sums = 1 + bool(run.stats.matrices) + bool(run.stats.vectors) + (run.precision == "fp16")
    owners = run.vocabulary_ranks  # ranks between which head and embedding are divided
    sums += micro_steps if owners < run.ranks else 0  # the loss, over nodes
    persistent_calls = min(1, len(run.persistent_sizes))  # one collective gathers all of them after the update

    def ring(name: str, received: float, calls: float, phase: Phase) -> Transfer:
        return Transfer(name, received, calls, others * calls, "ring", phase)

    distinct_ids = expected_distinct_ids(run.stats.vocab_size, run.micro_batch_tokens)
    gradient = 0 if run.frozen_head else 4
    looked_up = micro_steps * distinct_ids * (run.stats.hidden_size * (e + gradient) + 8) * (owners - 1) / owners
    lookup_calls = micro_steps * (2 if run.frozen_head else 3)
    optional = [_head_transfer(run)] if run.sequence_parallel_size > 1 else []
    optional += [_node_transfer(run)] if owners < run.ranks and not run.frozen_head else []
    return [
        *_parameter_transfers(run),
        ring("gradients", micro_steps * fraction * reduced * e, micro_steps * len(reductions), "layers"),
        ring("persistent parameters", fraction * persistent * e, persistent_calls, "alone"),
        Transfer("sums", 0.0, sums, 2 * others * sums, "ring", "alone"),
        _loss_transfer(run),
        # Ids, rows and their gradients. The counts are exchanged with the layout.
        Transfer(
            "input embeddings", looked_up, lookup_calls, lookup_calls * (owners - 1), "all-to-all", "alone", owners
        ),
        *optional,
    ]


def _parameter_transfers(run: PlannedRun) -> list[Transfer]:
    """Estimate the gathers of the decoder's parameters.

    With hpZ, only the first gather of a parameter after an update is from all ranks. It leaves a secondary partition,
    from which later gathers are served.
    """
    steps, gathers, e = run.gradient_accumulation_steps, run.gathers, run.element_size
    total = steps * gathers.gathered_elements(run.ranks)
    first = run.partition_elements(run.secondary_sizes) * run.ranks if run.zero.hpz > 1 else total
    first = min(first, total)
    transfers = []
    for name, elements, ranks in (
        ("parameters", first, run.ranks),
        ("parameters within nodes", total - first, run.zero.hpz),
    ):
        if elements or ranks == run.ranks:
            calls = steps * gathers.calls * (elements / total if total else 1.0)
            received = (ranks - 1) / ranks * elements * e
            transfers.append(Transfer(name, received, calls, (ranks - 1) * calls, "ring", "layers", ranks))
    return transfers


def _node_transfer(run: PlannedRun) -> Transfer:
    """Estimate the exchange between vocabulary shards of nodes and ZeRO-3 partitions.

    Once per optimizer step, a rank receives the weights of N = R / G partitions, and the fp32 gradients of its own
    partition from N nodes. Frozen weights are received once in a run, which is not counted.
    """
    nodes, matrices = run.ranks // run.vocabulary_ranks, len(run.stats.vocabulary)
    elements = nodes * run.partition_elements(run.stats.vocabulary) * (run.ranks - 1) / run.ranks
    calls = 2 * matrices
    received = elements * (run.element_size + 4)
    return Transfer("vocabulary shards", received, calls, calls * (nodes - 1), "all-to-all", "alone")


def _head_transfer(run: PlannedRun) -> Transfer:
    """Estimate the exchange between tokens and heads of the ranks that share rows. The layers wait for it.

    Each layer exchanges queries, keys and values before attention and its output after it, in forward, in backward and,
    with activation checkpointing, when it recomputes forward.
    """
    config, parts = run.stats.config, run.sequence_parallel_size
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    key_value_heads *= parts // math.gcd(key_value_heads, parts)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    elements = run.micro_batch_tokens * (2 * heads + 2 * key_value_heads) * head_size
    passes = run.gradient_accumulation_steps * len(run.stats.layers) * (3 if run.checkpointing else 2)
    received = passes * elements * run.element_size * (parts - 1) / parts
    return Transfer("attention heads", received, 2 * passes, 2 * passes * (parts - 1), "all-to-all", "alone", parts)


def _loss_transfer(run: PlannedRun) -> Transfer:
    """Estimate the communication of the loss over all micro-steps, for a non-zero alignment weight."""
    steps, ranks = run.gradient_accumulation_steps, run.vocabulary_ranks
    calls, all_reduces = run.loss_traffic.collectives(run.head)
    # The layout is gathered once for all micro-steps.
    received, hops = steps * run.loss_traffic.received(run.head), (ranks - 1) * (1 + steps * (calls + all_reduces))
    return Transfer("loss", received, 1 + steps * calls, hops, "ring", "loss", ranks)


def expected_distinct_ids(vocab_size: int, tokens: float) -> float:
    """Return the expected number of distinct ids among uniformly random tokens, which is an upper bound for text."""
    return vocab_size * (1 - (1 - 1 / vocab_size) ** tokens)

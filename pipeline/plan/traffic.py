"""Bytes that a rank receives in one optimizer step, by purpose and by link.

A ring passes the data of a collective from rank to rank. Ranks of a node are neighbours, and NCCL lays rings through
all network cards of a node, so each card carries 1/g of what enters the node. In an all-to-all each pair of ranks talks
on its own. A chain is one ring of single messages (the head's shards in `gathered`): the pair of ranks at a node's
border share one card.

Shape letters: R ranks, g of a node, U distinct token ids of a micro-batch, d hidden size.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.plan.memory import reductions
from pipeline.plan.workload import Run

Pattern = Literal["ring", "all-to-all", "chain"]
Phase = Literal["layers", "loss", "alone"]
SUMS = 3  # all-reduces of a step: its totals, and a norm for each of the optimizer's two groups; fp16 has one more


@dataclass(frozen=True)
class Transfer:
    """One kind of communication in an optimizer step.

    Attributes:
        received: bytes that each rank receives. calls: collectives, or messages of a chain. hops: messages that
            follow each other, R - 1 for a collective on a ring, twice that for an all-reduce.
        phase: what it can overlap with: the layers' computation, the loss's, or nothing.
    """

    name: str
    received: float
    calls: float
    hops: float
    pattern: Pattern
    phase: Phase

    def between_nodes(self, ranks: int, per_node: int) -> float:
        """Of the received bytes, those from other nodes, as a mean over the ranks of a node."""
        if ranks <= per_node:
            return 0.0
        if self.pattern == "all-to-all":
            return self.received * (ranks - per_node) / (ranks - 1)
        if self.pattern == "chain":
            return self.received / per_node
        return self.received * (ranks - per_node) / (ranks - 1) / per_node


def transfers(run: Run) -> list[Transfer]:
    """All of one optimizer step; of the sums of a few numbers only the hops count."""
    if run.ranks == 1:
        return []
    others, steps, share, e = run.ranks - 1, run.accumulation, (run.ranks - 1) / run.ranks, run.element
    reduced = reductions(run)
    padded = sum(-(-size // run.ranks) for _, sizes in reduced for size in sizes) * run.ranks
    persistent = sum(-(-size // run.ranks) for size in run.persistent) * run.ranks
    # One collective gathers all of them after the update.
    alone = min(1, len(run.persistent))

    def ring(name: str, received: float, calls: float, phase: Phase) -> Transfer:
        return Transfer(name, received, calls, others * calls, "ring", phase)

    gathered = steps * share * run.gathers.elements(run.ranks) * e
    found = [
        ring("parameters", gathered, steps * run.gathers.calls, "layers"),
        ring("gradients", steps * share * padded * e, steps * len(reduced), "layers"),
        ring("persistent parameters", share * persistent * e, alone, "alone"),
        Transfer("sums", 0.0, SUMS, 2 * others * SUMS, "ring", "alone"),
    ]
    rows = distinct(run.facts.vocab, run.rows * run.work.width)
    lookup = steps * rows * (run.facts.hidden * (e + 4) + 8) * share
    return [
        *found,
        _loss(run),
        Transfer("input embeddings", lookup, 4 * steps, 4 * steps * others, "all-to-all", "alone"),
    ]


def _loss(run: Run) -> Transfer:
    """Of all micro-steps; the collectives are those of `pipeline.loss`, where summaries have a gradient."""
    steps, others, c = run.accumulation, run.ranks - 1, run.chunks
    if run.head == "gathered":
        rings, sums, exchanges = 4, c.blocks + 1, 2 * c.blocks
        chain = others * (c.pieces + c.recomputed) + (2 * run.ranks - 1) * c.pieces
        calls = steps * (rings + sums + exchanges + chain)
        # In backward a shard's gradient travels beside the next shard.
        follow = others * (c.pieces + c.recomputed) + run.ranks * c.pieces
        hops = steps * (others * (rings + 2 * sums + exchanges) + follow)
        return Transfer("loss", steps * run.loss_traffic.gathered, calls, hops, "chain", "loss")
    # Layout; hidden states, statistics and gradients of each piece. Summaries of each block; inner products of each
    # piece with moved sequences, which a block has not where it is a pivot on every rank (taken as aligned).
    alone = c.block_sequences <= 1 and "pivot" in run.config.loss.detach
    moved = c.pieces * (run.work.pairs / run.work.sequences if alone else 1.0)
    gathers, reduces = 3 + 3 * c.pieces + c.recomputed, c.blocks + moved
    received = steps * run.loss_traffic.vocab_parallel
    return Transfer(
        "loss", received, steps * (gathers + reduces), steps * others * (gathers + 2 * reduces), "ring", "loss"
    )


def distinct(vocab: int, tokens: float) -> float:
    """Expected distinct ids among tokens drawn evenly; text repeats itself more, so it is an upper bound."""
    return vocab * (1 - (1 - 1 / vocab) ** tokens)

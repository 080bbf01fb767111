"""Bytes that a rank receives in one optimizer step, by purpose and by link.

A ring passes the data of a collective from rank to rank. Ranks of a node are neighbours, and NCCL lays rings through
all network cards of a node, so each card carries 1/g of what enters the node. In an all-to-all each pair of ranks talks
on its own. A chain is one ring of single messages (the head's shards in `gathered`): the pair of ranks at a node's
border share one card.

Shape letters: R ranks, g of a node, U distinct token ids of a micro-batch, d hidden size.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.planning.memory import reductions
from pipeline.planning.run import Run

Pattern = Literal["ring", "all-to-all", "chain"]


@dataclass(frozen=True)
class Transfer:
    """One kind of communication in an optimizer step.

    Attributes:
        received: bytes that each rank receives. calls: collectives or hops.
        phase: what it can overlap with: the layers' computation, the loss's, or nothing.
    """

    name: str
    received: float
    calls: float
    pattern: Pattern
    phase: Literal["layers", "loss", "alone"]

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
    """All of one optimizer step; sums of a few numbers (norms, totals) are left out."""
    if run.ranks == 1:
        return []
    steps, share, e = run.accumulation, (run.ranks - 1) / run.ranks, run.element
    reduced = reductions(run)
    padded = sum(-(-size // run.ranks) for _, sizes in reduced for size in sizes) * run.ranks
    persistent = sum(-(-size // run.ranks) for size in run.persistent) * run.ranks
    gathered = steps * share * run.gathers.elements(run.ranks) * e
    found = [
        Transfer("parameters", gathered, steps * run.gathers.calls, "ring", "layers"),
        Transfer("gradients", steps * share * padded * e, steps * len(reduced), "ring", "layers"),
        Transfer("persistent parameters", share * persistent * e, 1, "ring", "alone"),
    ]
    if run.peer:
        vocabulary = sum(run.facts.vocabulary)
        uses = 4 if run.facts.tied else 2  # a tied matrix is used at both ends
        gathered = steps * share * vocabulary * e
        return [*found, Transfer("vocabulary", gathered * (uses + 1), steps * (uses + 1), "ring", "layers")]
    received = steps * getattr(run.loss_traffic, run.head)
    pieces = run.chunks.pieces + run.chunks.recomputed
    if run.head == "gathered":
        loss = Transfer("loss", received, steps * (pieces + run.chunks.pieces) * run.ranks, "chain", "loss")
    else:
        loss = Transfer("loss", received, steps * 4 * pieces, "ring", "loss")
    rows = distinct(run.facts.vocab, run.rows * run.work.width)
    lookup = rows * (run.facts.hidden * (e + 4) + 8) * share
    return [*found, loss, Transfer("input embeddings", steps * lookup, steps * 4, "all-to-all", "alone")]


def distinct(vocab: int, tokens: float) -> float:
    """Expected distinct ids among tokens drawn evenly; text repeats itself more, so it is an upper bound."""
    return vocab * (1 - (1 - 1 / vocab) ** tokens)

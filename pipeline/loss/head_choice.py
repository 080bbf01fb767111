"""Divide the target tokens into chunks for one of the two heads, and choose the head that receives fewer bytes.

Shape letters: R ranks, S sequences of all ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .chunking import AlignmentGroup, BufferSizes, Chunk, schedule
from .indexing import bounds
from .layout import GlobalLayout
from .settings import LossSettings
from .traffic import Traffic

HEADS: tuple[Literal["vocab_parallel", "gathered"], ...] = ("vocab_parallel", "gathered")


@dataclass(frozen=True)
class HeadSchedule:
    """Chunks of a micro-step for one head. Equal on all ranks.

    Attributes:
        chunks: the chunks.
        order: [S] indices of the sequences in chunk order.
        gather_rows: whether the vocabulary-parallel head is used, or else the ring head.
    """

    chunks: list[Chunk]
    order: Tensor
    gather_rows: bool


def choose_head(
    layout: GlobalLayout, sizes: BufferSizes, settings: LossSettings, vocab: int, top_k: int | None
) -> HeadSchedule:
    """Divide the target tokens into chunks for the head of the settings, or for that with less traffic.

    Args:
        layout: layout of all ranks, ordered by rank.
        sizes: sizes of the buffers.
        settings: settings of the loss.
        vocab: V, the unpadded vocabulary size.
        top_k: number of logits that a soft token mixes, or None for all.
    """
    if sizes.ranks == 1 or settings.head != "auto":
        return _schedule(layout, sizes, settings, sizes.ranks == 1 or settings.head == "vocab_parallel")
    # More chunks never decrease the traffic, so the second head is only scheduled if it could have less.
    in_one = traffic(layout, sizes, settings, vocab, top_k, None)
    at_least = {name: float(getattr(in_one, name)) for name in HEADS}
    first, second = sorted(HEADS, key=lambda name: at_least[name])
    candidates = {first: _schedule(layout, sizes, settings, first == "vocab_parallel")}
    received = {first: getattr(traffic(layout, sizes, settings, vocab, top_k, candidates[first].chunks), first)}
    if received[first] > at_least[second]:
        candidates[second] = _schedule(layout, sizes, settings, second == "vocab_parallel")
        received[second] = getattr(traffic(layout, sizes, settings, vocab, top_k, candidates[second].chunks), second)
    return candidates[min(received, key=lambda name: received[name])]


def _schedule(layout: GlobalLayout, sizes: BufferSizes, settings: LossSettings, gather_rows: bool) -> HeadSchedule:
    rows, kind = sizes.rows_that_fit(settings, gather_rows), alignment_group(settings)
    chunks, order = schedule(layout.lengths, layout.pivot, layout.sequence_counts, rows, kind, layout.longest_parts)
    return HeadSchedule(chunks, order, gather_rows)


def alignment_group(settings: LossSettings) -> AlignmentGroup:
    """Return the kind of alignment group that the settings require."""
    if not settings.pools_vocabulary:
        return "sequence"
    if settings.distance == "infonce":
        return "all"
    return "sequence" if "pivot" in settings.detach else "pair_group"


def traffic(
    layout: GlobalLayout,
    sizes: BufferSizes,
    settings: LossSettings,
    vocab: int,
    top_k: int | None,
    chunks: list[Chunk] | None,
) -> Traffic:
    """Return the traffic of a micro-step. `chunks`: its chunks, or None for a single one of a single subchunk."""
    tokens = bounds(layout.lengths)[bounds(layout.sequence_counts)].diff()
    sequences = len(layout.lengths)
    pivots = int((layout.pivot == torch.arange(sequences)).sum()) if "pivot" in settings.detach else 0
    padded, recomputed = [int(tokens.max())], []
    if chunks is not None:
        padded = [subchunk.max_count for chunk in chunks for subchunk in chunk.subchunks]
        recomputed = [s.max_count for chunk in chunks if len(chunk.subchunks) > 1 for s in chunk.subchunks]
    return Traffic(
        ranks=sizes.ranks,
        vocab=vocab,
        hidden=sizes.hidden,
        element_size=sizes.element_size,
        positions=int(tokens.sum()),
        padded=sum(padded),
        subchunks=len(padded),
        recomputed=len(recomputed),
        padded_recomputed=sum(recomputed),
        sequences=sequences,
        requires_grad=sequences - pivots,
        top_k=None if top_k is None else min(top_k, vocab),
        frozen_head=sizes.frozen_head,
        pools_vocabulary=settings.pools_vocabulary,
    )

"""Divide the target tokens into chunks for one of the two heads, and choose the head that should take less time.

Shape letters: R ranks, S sequences of all ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import AlignmentGroup, BufferSizes, Chunk, schedule
from .head_time import ClusterSpeeds, loss_seconds
from .indexing import bounds
from .layout import GlobalLayout
from .settings import LossSettings, ResolvedHead
from .traffic import Traffic

HEADS: tuple[ResolvedHead, ...] = ("vocab_parallel", "gathered")


@dataclass(frozen=True)
class HeadSchedule:
    """Chunks of a micro-step for one head. Equal on all ranks.

    Attributes:
        chunks: the chunks.
        order: [S] indices of the sequences in chunk order.
        vocab_parallel: whether the head is `vocab_parallel`, or else `gathered`.
    """

    chunks: list[Chunk]
    order: Tensor
    vocab_parallel: bool


def choose_head(
    layout: GlobalLayout,
    sizes: BufferSizes,
    settings: LossSettings,
    vocab: int,
    top_k: int | None,
    speeds: ClusterSpeeds,
) -> HeadSchedule:
    """Divide the target tokens into chunks for the head that `settings.head` names.

    With `auto`, it is the head with the shorter predicted time. On one rank, it is always `vocab_parallel`.

    Args:
        layout: layout of all ranks, ordered by rank.
        sizes: sizes of the buffers.
        settings: settings of the loss.
        vocab: V, the unpadded vocabulary size.
        top_k: number of logits that a soft token mixes, or None for all.
        speeds: speeds by which the time is predicted.
    """
    if sizes.ranks == 1 or settings.head != "auto":
        return _schedule(layout, sizes, settings, sizes.ranks == 1 or settings.head == "vocab_parallel")

    def seconds(head: ResolvedHead, chunks: list[Chunk] | None) -> float:
        return loss_seconds(traffic(layout, sizes, settings, vocab, top_k, chunks), head, speeds)

    # More chunks never decrease the time, so the second head is only scheduled if it could take less.
    at_least = {head: seconds(head, None) for head in HEADS}
    first, second = sorted(HEADS, key=lambda head: at_least[head])
    candidates = {first: _schedule(layout, sizes, settings, first == "vocab_parallel")}
    predicted = {first: seconds(first, candidates[first].chunks)}
    if predicted[first] > at_least[second]:
        candidates[second] = _schedule(layout, sizes, settings, second == "vocab_parallel")
        predicted[second] = seconds(second, candidates[second].chunks)
    return candidates[min(predicted, key=lambda head: predicted[head])]


def _schedule(layout: GlobalLayout, sizes: BufferSizes, settings: LossSettings, vocab_parallel: bool) -> HeadSchedule:
    rows, kind = sizes.rows_that_fit(settings, vocab_parallel), alignment_group(settings)
    chunks, order = schedule(layout.lengths, layout.pivot, layout.sequence_counts, rows, kind, layout.longest_parts)
    return HeadSchedule(chunks, order, vocab_parallel)


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
        chunks=1 if chunks is None else len(chunks),
        blocks=-(-sizes.shard_rows // sizes.block_rows(settings)),
        passes=settings.logit_passes,
        pools_vocabulary=settings.pools_vocabulary,
    )

"""Divide the target tokens into chunks whose logits fit the buffer. The result is the same on all ranks.

An *alignment group* is a set of sequences whose pooled representations must all be known before the gradient of any of
them can be computed. It is one sequence, a pair group (a pivot and its translations), or the whole micro-step.
A *chunk* contains as many whole alignment groups as fit the buffer. A group that does not fit becomes a chunk of
several *subchunks*, whose logits are computed twice. The rows of a subchunk are ordered by rank.

Target tokens and sequences are numbered in chunk order, so that each chunk and each subchunk is a slice. There are no
loops over ranks or sequences, because thousands of them would take longer than the GPU takes for the layers.

Shape letters: R ranks, S sequences of all ranks, n sequences of a chunk, C rows of a subchunk.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .indexing import bounds, ranges
from .kernels import row_stride
from .settings import CPU_BUDGET_MB, GPU_BUDGET_MB, LossSettings
from .vocabulary import Vocabulary

AlignmentGroup = Literal["sequence", "pair_group", "all"]

# [R * C, d] tensors alive at the same time: hidden states of this and of the next subchunk, their multiple, the partial
# gradient, and the partial gradients of an earlier subchunk that are being sent and received.
HIDDEN_TENSORS, HIDDEN_TENSORS_OF_ONE_RANK = 6, 2
BLOCKS_FRACTION = 0.25  # part of the memory budget for the blocks of the ring head and their gradients


@dataclass(frozen=True)
class Subchunk:
    """Target tokens whose logits are in the buffer at the same time. All tensors are on the host.

    Attributes:
        starts: [R] first target token of each rank, numbered as in its `LossBatch`.
        counts: [R] number of target tokens of each rank.
        start: number of the subchunk's first target token in chunk order.
        edges: [n + 1] rows [edges[i], edges[i + 1]) belong to sequence i of the chunk.
        skipped: [n] number of target tokens of each sequence that are in earlier subchunks.
    """

    starts: Tensor
    counts: Tensor
    start: int
    edges: Tensor
    skipped: Tensor

    @cached_property
    def count_list(self) -> list[int]:
        """`counts` as a list."""
        return self.counts.tolist()

    @cached_property
    def total(self) -> int:
        """Number of rows, C."""
        return int(self.counts.sum())

    @cached_property
    def tokens(self) -> slice:
        """The subchunk's target tokens in chunk order."""
        return slice(self.start, self.start + self.total)

    @cached_property
    def max_count(self) -> int:
        """Largest number of target tokens of a rank."""
        return int(self.counts.max())

    @cached_property
    def is_even(self) -> bool:
        """Whether all ranks have the same number of target tokens."""
        return int(self.counts.min()) == self.max_count

    def local(self, rank: int) -> slice:
        """Return the target tokens of one rank, numbered as in its `LossBatch`."""
        start = int(self.starts[rank])
        return slice(start, start + int(self.counts[rank]))


@dataclass(frozen=True)
class Chunk:
    """Whole alignment groups of every rank.

    Attributes:
        subchunks: parts that are in the buffer one after the other; usually only one.
        sequence_bounds: [R + 1] on the host. In chunk order, the sequences of rank r are those in
            [sequence_bounds[r], sequence_bounds[r + 1]).
    """

    subchunks: tuple[Subchunk, ...]
    sequence_bounds: Tensor

    @cached_property
    def first(self) -> int:
        """Number of the chunk's first sequence in chunk order."""
        return int(self.sequence_bounds[0])

    @cached_property
    def sequences(self) -> slice:
        """All sequences of the chunk, in chunk order."""
        return slice(self.first, int(self.sequence_bounds[-1]))

    def sequences_of_rank(self, rank: int) -> slice:
        """Return the sequences of one rank, in chunk order."""
        return slice(*self.sequence_bounds[rank : rank + 2].tolist())

    def passes(self, backward: bool) -> tuple[Subchunk, ...]:
        """Return the subchunks in the order in which their hidden states are needed.

        If there are several, each is needed again in the `backward` pass.
        """
        return self.subchunks * 2 if backward and len(self.subchunks) > 1 else self.subchunks


@dataclass(frozen=True)
class BufferSizes:
    """Sizes that determine how many target tokens fit in the memory budget.

    Attributes:
        ranks: R. shard_rows: v, including padding. hidden: d. element_size: bytes of a weight.
        softcap: whether the logits are soft-capped.
        gpu: whether to use the default budget of a GPU. frozen_head: whether the head has no gradient in training.
    """

    ranks: int
    shard_rows: int
    hidden: int
    element_size: int
    softcap: bool
    gpu: bool
    frozen_head: bool = False

    @classmethod
    def of(cls, vocabulary: Vocabulary, ranks: int) -> "BufferSizes":
        """Return the sizes of a vocabulary on that many ranks."""
        weight, softcap = vocabulary.head.weight, vocabulary.softcap is not None
        frozen, size = torch.is_grad_enabled() and vocabulary.head.grad is None, weight.element_size()
        return cls(ranks, vocabulary.shard_rows(ranks), weight.shape[1], size, softcap, weight.is_cuda, frozen)

    def rows_that_fit(self, settings: LossSettings, vocab_parallel: bool) -> int:
        """Return the number of target tokens per rank that fit in one subchunk, which is equal on all ranks.

        With `vocab_parallel`, a subchunk has R times as many rows, but R times fewer columns. Neither the logits and
        hidden states nor the lists of largest logits exceed the memory budget.

        Args:
            settings: determine the memory budget.
            vocab_parallel: whether the head is `vocab_parallel`, or else `gathered`.
        """
        ranks, size = self.ranks, self.element_size
        if vocab_parallel:
            hidden = ranks * (HIDDEN_TENSORS if ranks > 1 else HIDDEN_TENSORS_OF_ONE_RANK) * self.hidden * size
            row_bytes = ranks * row_stride(self.shard_rows, self.gpu)
            rows = rows_in_budget(settings, row_bytes * size, self.softcap, self.gpu, hidden)
            lists = top_k_bytes(settings, ranks * self.shard_rows, size, ranks)
            return min(rows, max(1, int(budget_bytes(settings, self.gpu) / lists))) if lists else rows
        # A block of logits is copied into the buffer, and a block of their gradients out of it.
        block = ranks * self.block_rows(settings) * size + HIDDEN_TENSORS_OF_ONE_RANK * self.hidden * size
        row_bytes = row_stride(ranks * self.shard_rows, self.gpu) * size
        return rows_in_budget(settings, row_bytes, self.softcap, self.gpu, block, 1 - BLOCKS_FRACTION)

    def block_rows(self, settings: LossSettings) -> int:
        """Return the number of rows of each shard that the head `gathered` gathers at a time."""
        budget = BLOCKS_FRACTION * budget_bytes(settings, self.gpu)
        # Two blocks, and the fp32 gradients of two blocks.
        row_bytes = self.ranks * self.hidden * 2 * (self.element_size + max(4, self.element_size))
        return max(1, min(self.shard_rows, int(budget / row_bytes)))


def budget_bytes(settings: LossSettings, gpu: bool) -> float:
    """Return the memory budget in bytes. `gpu`: whether to use the default of a GPU."""
    return (settings.memory_budget_mb or (GPU_BUDGET_MB if gpu else CPU_BUDGET_MB)) * 2**20


def top_k_bytes(settings: LossSettings, vocab_size: int, element_size: int, ranks: int) -> int:
    """Return the bytes that the selection of the k largest logits needs on a rank, per target token of each rank.

    With the head `vocab_parallel`, a rank has the target tokens of all R ranks. For each of them it holds every logit
    that it selects among its columns twice, with three int64 indices each, and three copies of the k exchanged logits.
    """
    if settings.num_selected is None:
        return 0
    k = min(settings.num_selected, vocab_size)
    selected = min(k, -(-vocab_size // ranks))
    return ranks * (selected * (2 * element_size + 3 * 8) + 3 * k * element_size)


def rows_in_budget(
    settings: LossSettings, row_bytes: int, softcap: bool, gpu: bool, other_bytes: int = 0, fraction: float = 1.0
) -> int:
    """Return the number of target tokens per rank that fit in one subchunk, computed from sizes only.

    Args:
        settings: determine the memory budget and whether a second softmax is needed.
        row_bytes: bytes of one row of logits over the whole vocabulary, including padding of the row.
        softcap: whether the logits are soft-capped.
        gpu: whether to use the default budget for a GPU.
        other_bytes: bytes of all other tensors with a row per target token, such as hidden states.
        fraction: part of the budget that is available for rows.
    """
    tensors = 1 + settings.needs_second_softmax + softcap
    return max(1, int(fraction * budget_bytes(settings, gpu) / (row_bytes * tensors + other_bytes)))


def schedule(
    lengths: Tensor,
    pivot: Tensor,
    sequence_counts: Tensor,
    rows: int,
    alignment_group: AlignmentGroup,
    longest: Tensor | None = None,
) -> tuple[list[Chunk], Tensor]:
    """Divide the sequences of all ranks into chunks. All parts of a sequence are in the same chunk.

    Args:
        lengths: [S] number of target tokens of each sequence, ordered by rank.
        pivot: [S] index of the pivot of each sequence.
        sequence_counts: [R] number of sequences of each rank.
        rows: number of target tokens per rank that fit in one subchunk.
        alignment_group: kind of alignment group. Groups are not divided between chunks.
        longest: [S] length of the longest part of the same sequence, if ranks share rows.

    Returns:
        The chunks, and the [S] indices of the sequences in chunk order.
    """
    ends, of_rank = bounds(lengths), bounds(sequence_counts)
    cuts = list(_cuts(ends if longest is None else bounds(longest), pivot, of_rank, rows, alignment_group))
    if not cuts:
        return [], torch.arange(0)
    first, last = (torch.stack(parts) for parts in zip(*cuts, strict=True))  # [chunks, R]
    counts, tokens = last - first, ends[last] - ends[first]
    order = ranges(first.flatten(), counts.flatten())
    chunk_bounds = bounds(counts.sum(1))

    # Subchunks of all chunks: [subchunks, R].
    in_chunk = -(-tokens.amax(1) // rows)
    chunk = torch.repeat_interleave(in_chunk)
    offset = ranges(torch.zeros_like(in_chunk), in_chunk)[:, None] * rows
    starts = torch.minimum(ends[first][chunk] + offset, ends[last][chunk])
    stops = torch.minimum(starts + rows, ends[last][chunk])
    local_starts, token_counts = starts - ends[of_rank[:-1]], stops - starts
    done = bounds(token_counts.sum(1)).tolist()

    # Sequences of all subchunks, one subchunk after the other.
    sizes = counts.sum(1)[chunk]
    sequences = order.index_select(0, ranges(chunk_bounds[chunk], sizes))
    repeats = counts[chunk].flatten()
    sequence_starts, sequence_stops = (ends.index_select(0, sequences + after) for after in (0, 1))
    begin = torch.maximum(sequence_starts, torch.repeat_interleave(starts.flatten(), repeats))
    stop = torch.minimum(sequence_stops, torch.repeat_interleave(stops.flatten(), repeats))
    rows_before, skipped = bounds((stop - begin).clamp_min(0)), begin - sequence_starts
    subchunks = []
    for k, (at, end) in enumerate(itertools.pairwise(bounds(sizes).tolist())):
        edges = rows_before[at : end + 1] - rows_before[at]
        subchunks.append(Subchunk(local_starts[k], token_counts[k], done[k], edges, skipped[at:end]))
    chunks = []
    sequence_bounds = torch.nn.functional.pad(counts.cumsum(1), (1, 0)) + chunk_bounds[:-1, None]
    for j, (at, end) in enumerate(itertools.pairwise(bounds(in_chunk).tolist())):
        if end > at:
            chunks.append(Chunk(tuple(subchunks[at:end]), sequence_bounds[j]))
    return chunks, order


def _cuts(
    ends: Tensor, pivot: Tensor, of_rank: Tensor, rows: int, alignment_group: AlignmentGroup
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the sequences [first, last) of every rank, [R] each, for one chunk after the other.

    A chunk gets as many whole alignment groups of each rank as fit, but at least one with target tokens.

    Args:
        ends: [S + 1] number of target tokens before each sequence.
        pivot, rows, alignment_group: as in `schedule`.
        of_rank: [R + 1] the sequences of rank r are those in [of_rank[r], of_rank[r + 1]).
    """
    if alignment_group == "all":
        yield of_rank[:-1], of_rank[1:]
        return
    numbers = torch.arange(len(pivot))
    begins = numbers if alignment_group == "sequence" else (pivot == numbers).nonzero().squeeze(1)
    begins = torch.cat([begins, torch.tensor([len(pivot)])])
    before = ends[begins]  # target tokens before each group
    group, limit = torch.searchsorted(begins, of_rank).unfold(0, 2, 1).unbind(1)
    while (group < limit).any():
        used = before[group]
        fitting = torch.searchsorted(before, used + rows, right=True) - 1
        one_with_tokens = torch.searchsorted(before, used, right=True)
        following = torch.minimum(torch.maximum(fitting, one_with_tokens), limit)
        yield begins[group], begins[following]
        group = following

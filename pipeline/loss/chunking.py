"""Divide the target tokens into chunks whose logits fit the buffer. The result is the same on all ranks.

An *alignment group* is a set of sequences whose pooled representations must all be known before the gradient of any of
them can be computed. It is one sequence, a pair group (a pivot and its translations), or the whole micro-step.
A *chunk* contains as many whole alignment groups as fit the buffer. A group that does not fit becomes a chunk of
several *subchunks*, whose logits are computed twice. The rows of a subchunk are ordered by rank.

Target tokens and sequences are numbered in chunk order, so that each chunk and each subchunk is a slice.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from pipeline.loss.settings import LossSettings
from pipeline.loss.vocabulary import Vocabulary

AlignmentGroup = Literal["sequence", "pair_group", "all"]

# Rows of the logits begin at multiples of this number of elements. Matrix products and Triton's loads need rows aligned
# to 16 bytes to be fast, and whole cache lines are 128 bytes.
ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class SequenceSpan:
    """Rows [start, stop) of a subchunk that belong to one sequence.

    Attributes:
        start, stop: row indices within the subchunk.
        sequence: index of the sequence within the chunk.
    """

    start: int
    stop: int
    sequence: int


@dataclass(frozen=True)
class Subchunk:
    """Target tokens whose logits are in the buffer at the same time.

    Attributes:
        ranges: for each rank, its target tokens [start, end), numbered as in its `LossBatch`.
        start: number of the subchunk's first target token in chunk order.
        spans: rows of each sequence.
    """

    ranges: tuple[tuple[int, int], ...]
    start: int
    spans: tuple[SequenceSpan, ...]

    @cached_property
    def counts(self) -> list[int]:
        """Number of target tokens of each rank."""
        return [end - start for start, end in self.ranges]

    @cached_property
    def tokens(self) -> slice:
        """The subchunk's target tokens in chunk order."""
        return slice(self.start, self.start + sum(self.counts))

    @cached_property
    def max_count(self) -> int:
        """Largest number of target tokens of a rank."""
        return max(self.counts)

    @cached_property
    def is_even(self) -> bool:
        """Whether all ranks have the same number of target tokens."""
        return min(self.counts) == self.max_count

    def of_rank(self, rank: int, first_sequence: int) -> tuple[slice, tuple[SequenceSpan, ...]]:
        """Return the part of the subchunk that belongs to one rank.

        Args:
            rank: the rank.
            first_sequence: index of the rank's first sequence within the chunk.

        Returns:
            The rank's target tokens in chunk order, and their spans. Rows and sequences in the spans are relative to
            the rank's first row and first sequence.
        """
        first = sum(self.counts[:rank])
        last = first + self.counts[rank]
        spans = tuple(
            SequenceSpan(span.start - first, span.stop - first, span.sequence - first_sequence)
            for span in self.spans
            if first <= span.start < last
        )
        return slice(self.start + first, self.start + last), spans


@dataclass(frozen=True)
class Chunk:
    """Whole alignment groups of every rank.

    Attributes:
        subchunks: parts that are in the buffer one after the other; usually only one.
        first, last: the sequences [first, last) in chunk order, ordered by rank.
        sequence_counts: number of sequences of each rank.
    """

    subchunks: tuple[Subchunk, ...]
    first: int
    last: int
    sequence_counts: tuple[int, ...]

    @property
    def sequences(self) -> slice:
        """All sequences of the chunk, in chunk order."""
        return slice(self.first, self.last)

    def sequences_of_rank(self, rank: int) -> slice:
        """Return the sequences of one rank, in chunk order."""
        start = self.first + sum(self.sequence_counts[:rank])
        return slice(start, start + self.sequence_counts[rank])

    def passes(self, backward: bool) -> tuple[Subchunk, ...]:
        """Return the subchunks in the order in which their hidden states are needed.

        If there are several, each is needed again in the `backward` pass.
        """
        return self.subchunks * 2 if backward and len(self.subchunks) > 1 else self.subchunks


def row_stride(columns: int) -> int:
    """Return the number of elements between rows of `columns` elements, which keeps all rows aligned on a GPU."""
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


def rows_that_fit(vocabulary: Vocabulary, settings: LossSettings, ranks: int) -> int:
    """Return the number of target tokens per rank that fit in one subchunk, which is equal on all ranks.

    With the vocabulary-parallel head, a subchunk has R = `ranks` times as many rows, but R times fewer columns.
    """
    weight = vocabulary.head.weight
    row_bytes = ranks * row_stride(vocabulary.shard_sizes(ranks)[0]) * weight.element_size()
    return rows_in_budget(settings, row_bytes, vocabulary.softcap is not None, weight.is_cuda)


def needs_second_softmax(settings: LossSettings) -> bool:
    """Return whether the soft tokens need a second buffer, for the softmax of all logits at their temperature."""
    return settings.top_k is None and settings.softmax_temperature != 1


def rows_in_budget(settings: LossSettings, row_bytes: int, softcap: bool, gpu: bool) -> int:
    """Return the number of target tokens per rank that fit in one subchunk, computed from sizes only.

    Args:
        settings: determine the memory budget and whether a second softmax is needed.
        row_bytes: bytes of one row of logits over the whole vocabulary, including padding of the row.
        softcap: whether the logits are soft-capped.
        gpu: whether to use the default budget for a GPU.
    """
    tensors = 1 + needs_second_softmax(settings) + softcap
    budget_mb = settings.memory_budget_mb or (2048 if gpu else 64)
    return max(1, int(budget_mb * 2**20 / (row_bytes * tensors)))


def schedule(
    lengths: list[list[int]], pivots: list[list[int]], rows: int, alignment_group: AlignmentGroup
) -> tuple[list[Chunk], list[tuple[int, int]]]:
    """Divide the sequences of all ranks into chunks.

    Args:
        lengths: for each rank and sequence, its number of target tokens.
        pivots: for each rank and sequence, the index of its pivot in that rank's list.
        rows: number of target tokens per rank that fit in one subchunk.
        alignment_group: kind of alignment group. Groups are not divided between chunks.

    Returns:
        The chunks, and for each sequence in chunk order its (rank, index in that rank's list).
    """
    per_rank = [_cut(n, p, rows, alignment_group) for n, p in zip(lengths, pivots, strict=True)]
    ends = [list(accumulate(n, initial=0)) for n in lengths]
    chunks: list[Chunk] = []
    order: list[tuple[int, int]] = []
    done = 0
    for index in range(max(len(cuts) for cuts in per_rank)):
        bounds = [
            cuts[index] if index < len(cuts) else (len(n), len(n)) for cuts, n in zip(per_rank, lengths, strict=True)
        ]
        tokens = [(end[first], end[last]) for (first, last), end in zip(bounds, ends, strict=True)]
        sequences = [(rank, i) for rank, (first, last) in enumerate(bounds) for i in range(first, last)]
        subchunks: list[Subchunk] = []
        for j in range(max(-(-(stop - start) // rows) for start, stop in tokens)):
            ranges = tuple((min(start + j * rows, stop), min(start + (j + 1) * rows, stop)) for start, stop in tokens)
            subchunks.append(Subchunk(ranges, done, _spans(ranges, sequences, ends)))
            done = subchunks[-1].tokens.stop
        if subchunks:
            counts = tuple(last - first for first, last in bounds)
            chunks.append(Chunk(tuple(subchunks), len(order), len(order) + len(sequences), counts))
        order += sequences
    return chunks, order


def _spans(
    ranges: tuple[tuple[int, int], ...], sequences: list[tuple[int, int]], ends: list[list[int]]
) -> tuple[SequenceSpan, ...]:
    """Return the spans of a subchunk. `sequences` holds the (rank, index) of the chunk's sequences, ordered by rank."""
    spans, row = [], 0
    for number, (rank, i) in enumerate(sequences):
        start, stop = ranges[rank]
        count = min(ends[rank][i + 1], stop) - max(ends[rank][i], start)
        if count > 0:
            spans.append(SequenceSpan(row, row + count, number))
            row += count
    return tuple(spans)


def _cut(lengths: list[int], pivots: list[int], rows: int, alignment_group: AlignmentGroup) -> list[tuple[int, int]]:
    """Return the sequences [first, last) of each chunk on one rank, with as many whole alignment groups as fit."""
    if alignment_group == "all":
        return [(0, len(lengths))]
    begins = [i for i in range(len(lengths)) if alignment_group == "sequence" or pivots[i] == i]
    cuts: list[tuple[int, int]] = []
    first, used = 0, 0
    for begin, stop in zip(begins, [*begins, len(lengths)][1:], strict=True):
        size = sum(lengths[begin:stop])
        if used and used + size > rows:
            cuts.append((first, begin))
            first, used = begin, 0
        used += size
    if first < len(lengths):
        cuts.append((first, len(lengths)))
    return cuts

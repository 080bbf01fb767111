"""How the supervised positions are cut into blocks whose logits fit the buffer. The same on every rank.

A *unit* must have all its summaries before any of its gradients: a sequence, a pair group, or everything.
A *block* is as many whole units as fit; a unit too long for the buffer is a block of several *pieces*, whose
logits are computed twice. Rows of a piece are ordered rank after rank.

Positions and sequences are numbered in the order of the blocks, so that each block and piece is a slice of them.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

Unit = Literal["sequence", "group", "all"]


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of a piece, all of one sequence (its number within the block)."""

    start: int
    stop: int
    sequence: int


@dataclass(frozen=True)
class Piece:
    """Positions whose logits are in the buffer together.

    Attributes:
        ranges: per rank, the [start, end) of its own supervised positions.
        start: number of the first of them in the order of the blocks.
    """

    ranges: tuple[tuple[int, int], ...]
    start: int
    runs: tuple[Run, ...]

    @cached_property
    def counts(self) -> list[int]:
        return [end - start for start, end in self.ranges]

    @cached_property
    def positions(self) -> slice:
        """In the order of the blocks."""
        return slice(self.start, self.start + sum(self.counts))

    def of_rank(self, rank: int, first_sequence: int) -> tuple[slice, tuple[Run, ...]]:
        """The rank's own positions and their runs, counted from its own first position and sequence."""
        first = sum(self.counts[:rank])
        last = first + self.counts[rank]
        runs = tuple(
            Run(run.start - first, run.stop - first, run.sequence - first_sequence)
            for run in self.runs
            if first <= run.start < last
        )
        return slice(self.start + first, self.start + last), runs

    @cached_property
    def longest(self) -> int:
        return max(self.counts)

    @cached_property
    def even(self) -> bool:
        return min(self.counts) == self.longest


@dataclass(frozen=True)
class Block:
    """Whole units of every rank.

    Attributes:
        first, last: [first, last) numbers of their sequences in the order of the blocks, rank after rank.
        members: how many of them each rank has.
    """

    pieces: tuple[Piece, ...]
    first: int
    last: int
    members: tuple[int, ...]

    @property
    def sequences(self) -> slice:
        return slice(self.first, self.last)

    def of_rank(self, rank: int) -> slice:
        """The rank's own sequences."""
        start = self.first + sum(self.members[:rank])
        return slice(start, start + self.members[rank])

    def passes(self, backward: bool) -> tuple[Piece, ...]:
        """The pieces in the order in which their hidden states are needed."""
        return self.pieces * 2 if backward and len(self.pieces) > 1 else self.pieces


def schedule(
    lengths: list[list[int]], pivots: list[list[int]], rows: int, unit: Unit
) -> tuple[list[Block], list[tuple[int, int]]]:
    """Blocks in order, with at most `rows` positions of each rank in one piece; and the order of the sequences.

    Args:
        lengths, pivots: for each rank and sequence, its positions and the index of its pivot in that rank's list.

    Returns:
        The blocks, and (rank, index in that rank's list) of each sequence in their order.
    """
    per_rank = [_cut(n, p, rows, unit) for n, p in zip(lengths, pivots, strict=True)]
    ends = [list(accumulate(n, initial=0)) for n in lengths]
    blocks: list[Block] = []
    order: list[tuple[int, int]] = []
    done = 0
    for index in range(max(len(cuts) for cuts in per_rank)):
        spans = [
            cuts[index] if index < len(cuts) else (len(n), len(n)) for cuts, n in zip(per_rank, lengths, strict=True)
        ]
        tokens = [(end[first], end[last]) for (first, last), end in zip(spans, ends, strict=True)]
        members = [(rank, i) for rank, (first, last) in enumerate(spans) for i in range(first, last)]
        pieces: list[Piece] = []
        for j in range(max(-(-(stop - start) // rows) for start, stop in tokens)):
            ranges = tuple((min(start + j * rows, stop), min(start + (j + 1) * rows, stop)) for start, stop in tokens)
            pieces.append(Piece(ranges, done, _runs(ranges, members, ends)))
            done = pieces[-1].positions.stop
        if pieces:
            counts = tuple(last - first for first, last in spans)
            blocks.append(Block(tuple(pieces), len(order), len(order) + len(members), counts))
        order += members
    return blocks, order


def _runs(
    ranges: tuple[tuple[int, int], ...], members: list[tuple[int, int]], ends: list[list[int]]
) -> tuple[Run, ...]:
    """The piece's rows by sequence; members are the block's sequences, rank after rank."""
    runs, row = [], 0
    for number, (rank, i) in enumerate(members):
        start, stop = ranges[rank]
        count = min(ends[rank][i + 1], stop) - max(ends[rank][i], start)
        if count > 0:
            runs.append(Run(row, row + count, number))
            row += count
    return tuple(runs)


def _cut(lengths: list[int], pivots: list[int], rows: int, unit: Unit) -> list[tuple[int, int]]:
    """[first, last) sequences of each block of one rank: whole units while they fit."""
    if unit == "all":
        return [(0, len(lengths))]
    begins = [i for i in range(len(lengths)) if unit == "sequence" or pivots[i] == i]
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

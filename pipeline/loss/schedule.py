"""How the supervised positions are cut into blocks whose logits fit the buffer. The same on every rank.

A *unit* must have all its summaries before any of its gradients: a sequence, a pair group, or everything.
A *block* is as many whole units as fit; a unit too long for the buffer is a block of several *pieces*, whose
logits are computed twice. Rows of a piece are ordered rank after rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Unit = Literal["sequence", "group", "all"]


@dataclass(frozen=True)
class Piece:
    """Per rank, the [start, end) of its supervised positions whose logits are in the buffer together."""

    ranges: tuple[tuple[int, int], ...]

    @cached_property
    def counts(self) -> list[int]:
        return [end - start for start, end in self.ranges]

    @cached_property
    def longest(self) -> int:
        return max(self.counts)

    @cached_property
    def even(self) -> bool:
        return min(self.counts) == self.longest


@dataclass(frozen=True)
class Block:
    """Whole units of every rank. `sequences`: their numbers, ascending, in the numbering over all ranks."""

    pieces: tuple[Piece, ...]
    sequences: tuple[int, ...]

    def passes(self, backward: bool) -> tuple[Piece, ...]:
        """The pieces in the order in which their hidden states are needed."""
        return self.pieces * 2 if backward and len(self.pieces) > 1 else self.pieces


def schedule(lengths: list[list[int]], pivots: list[list[int]], rows: int, unit: Unit) -> list[Block]:
    """Blocks in order, with at most `rows` positions of each rank in one piece.

    Args:
        lengths, pivots: for each rank and sequence, its positions and the index of its pivot in that rank's list.
    """
    per_rank = [_cut(n, p, rows, unit) for n, p in zip(lengths, pivots, strict=True)]
    starts = [sum(len(n) for n in lengths[:r]) for r in range(len(lengths))]
    ends = [[0] for _ in lengths]
    for n, end in zip(lengths, ends, strict=True):
        for length in n:
            end.append(end[-1] + length)

    blocks = []
    for index in range(max(len(cuts) for cuts in per_rank)):
        spans = [
            cuts[index] if index < len(cuts) else (len(n), len(n)) for cuts, n in zip(per_rank, lengths, strict=True)
        ]
        tokens = [(end[first], end[last]) for (first, last), end in zip(spans, ends, strict=True)]
        count = max(-(-(stop - start) // rows) for start, stop in tokens)
        pieces = tuple(
            Piece(tuple((min(start + j * rows, stop), min(start + (j + 1) * rows, stop)) for start, stop in tokens))
            for j in range(count)
        )
        numbers = tuple(s + i for s, (first, last) in zip(starts, spans, strict=True) for i in range(first, last))
        if pieces:
            blocks.append(Block(pieces, numbers))
    return blocks


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

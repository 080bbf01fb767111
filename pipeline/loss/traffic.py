"""How many bytes a rank receives in one micro-step, either way to divide the loss; counted, not measured.

An all-reduce of n bytes counts as 2 (R - 1) / R * n, as on a ring. Shards, and the ranks' numbers of positions and
sequences, are taken as equal.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What the counts depend on.

    Attributes:
        ranks: R. vocab: V. hidden: d. element_size: bytes of a weight or hidden state.
        positions: of all ranks together. padded: of the rank that has most, summed over the pieces.
        pieces: how often the buffer is filled. recomputed: how many of these are filled twice; padded_recomputed:
            their share of `padded`.
        sequences, moved: of all ranks, and those of them whose summaries have a gradient.
    """

    ranks: int
    vocab: int
    hidden: int
    element_size: int
    positions: int
    padded: int
    pieces: int
    recomputed: int
    padded_recomputed: int
    sequences: int
    moved: int

    @property
    def _share(self) -> float:
        return (self.ranks - 1) / self.ranks

    @property
    def _layout(self) -> float:
        """Target, pooling and cross-entropy weight of each position; four integers of each sequence."""
        return self._share * (self.positions * 16 + self.sequences * 32)

    @property
    def vocab_parallel(self) -> float:
        """Hidden states out (again for pieces filled twice), gradients back, statistics, inner products, summaries."""
        rows = 2 * self.padded + self.padded_recomputed
        activations = (self.ranks - 1) * rows * self.hidden * self.element_size
        statistics = (self.ranks - 1) * self.positions * 3 * 4 + 2 * self._share * self.positions * 4
        return self._layout + activations + statistics + 2 * self._share * self.sequences * self.hidden * 4

    @property
    def gathered(self) -> float:
        """The head in for each softmax and for the gradients, its fp32 gradient round, soft tokens to the owners."""
        passes = 2 * self.pieces + self.recomputed
        head = self._share * passes * self.vocab * self.hidden * self.element_size
        gradient = self.pieces * self.vocab * self.hidden * 4
        columns = self._share * self.vocab / self.ranks
        soft = columns * (self.sequences * 4 + self.moved * self.element_size)
        sums = 2 * self._share * (self.positions * 4 + self.sequences * self.hidden * 4)
        return self._layout + head + gradient + soft + sums

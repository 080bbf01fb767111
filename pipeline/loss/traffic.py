"""Compute the bytes that a rank receives in one micro-step with either head, from the sizes of the collectives.

An all-reduce of n bytes counts as 2 (R - 1) / R * n, as for a ring all-reduce. All ranks are assumed to have equal
shards and equal numbers of target tokens and sequences.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Sizes that determine the traffic of the loss, and the traffic in bytes.

    Attributes:
        ranks: R. vocab: V. hidden: d. element_size: bytes of a weight or hidden state.
        positions: target tokens of all ranks.
        padded: maximum number of target tokens over the ranks, summed over the subchunks.
        subchunks: number of subchunks.
        recomputed: number of subchunks whose logits are computed twice.
        padded_recomputed: the part of `padded` in those subchunks.
        sequences: sequences of all ranks.
        requires_grad: sequences of all ranks whose pooled representations have a gradient.
        top_k: number of logits that a soft token mixes, at most V; None for all.
        frozen_head: whether the head has no gradient.
        pools_vocabulary: whether the loss pools probabilities of the vocabulary.
    """

    ranks: int
    vocab: int
    hidden: int
    element_size: int
    positions: int
    padded: int
    subchunks: int
    recomputed: int
    padded_recomputed: int
    sequences: int
    requires_grad: int
    top_k: int | None
    frozen_head: bool = False
    pools_vocabulary: bool = True

    @property
    def _remote_fraction(self) -> float:
        return (self.ranks - 1) / self.ranks

    @property
    def _layout(self) -> float:
        """Bytes to gather the layout: the id of each target token, and five numbers per sequence."""
        return self._remote_fraction * 8 * (self.positions + 5 * self.sequences)

    @property
    def vocab_parallel(self) -> float:
        """Bytes received by a rank with the vocabulary-parallel head.

        Hidden states are gathered (twice for recomputed subchunks), and their gradients are exchanged. Softmax
        statistics, inner products and pooled representations are small.
        """
        rows = 2 * self.padded + self.padded_recomputed
        activations = (self.ranks - 1) * rows * self.hidden * self.element_size
        statistics = (self.ranks - 1) * self.positions * 3 * 4 + 2 * self._remote_fraction * self.positions * 4
        pooled = 2 * self._remote_fraction * self.sequences * self.hidden * 4
        return self._layout + activations + statistics + self.selection + pooled

    @property
    def selection(self) -> float:
        """Bytes that a rank receives to merge the k largest logits of all ranks: k logits and 4 results per position.

        Only with the vocabulary-parallel head. The ring head selects from whole rows.
        """
        if self.top_k is None:
            return 0.0
        return self._remote_fraction * self.positions * (self.top_k * self.element_size + 4 * 4)

    @property
    def gathered(self) -> float:
        """Bytes received by a rank with the ring head.

        The head is gathered for each softmax and for the gradients, and its fp32 gradient, if any, is reduce-scattered
        once per subchunk. Pooled probabilities are sent to the owners of the columns, which return the gradients.
        """
        passes = 2 * self.subchunks + self.recomputed
        head = self._remote_fraction * passes * self.vocab * self.hidden * self.element_size
        gradient = 0 if self.frozen_head else self._remote_fraction * self.subchunks * self.vocab * self.hidden * 4
        columns = self._remote_fraction * self.vocab / self.ranks
        soft = columns * (self.sequences * 4 + self.requires_grad * self.element_size) * self.pools_vocabulary
        # Cross entropy and, with top-k, kept mass and entropy of each position.
        values = 1 if self.top_k is None else 3
        sums = 2 * self._remote_fraction * (self.positions * 4 * values + self.sequences * self.hidden * 4)
        return self._layout + head + gradient + soft + sums

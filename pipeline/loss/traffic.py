"""Compute the bytes, collectives and computation of one micro-step with either head, from the sizes of the collectives.

An all-reduce of n bytes counts as 2 (R - 1) / R * n, as for a ring all-reduce. All ranks are assumed to have equal
shards and equal numbers of target tokens and sequences.
"""

from dataclasses import dataclass

from .settings import ResolvedHead


@dataclass(frozen=True)
class Traffic:
    """Sizes that determine the work of a rank in the loss, and that work: bytes, collectives, FLOPs.

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
        chunks: number of chunks. blocks: number of blocks of the head that the ring head gathers.
        inner_products: number of subchunks that have sequences with a gradient; None for all.
        passes: how often all logits are read or written.
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
    chunks: int = 1
    blocks: int = 1
    inner_products: float | None = None
    passes: int = 6

    def received(self, head: ResolvedHead) -> float:
        """Return the bytes received by a rank with a head."""
        return self.gathered if head == "gathered" else self.vocab_parallel

    def collectives(self, head: ResolvedHead) -> tuple[float, float]:
        """Return the number of collectives, without the gather of the layout, and how many of them are all-reduces."""
        if head == "gathered":
            # Gathers of the head, twice and once more for recomputed subchunks, and reduce-scatters of a gradient.
            blocks = self.blocks * ((2 if self.frozen_head else 3) * self.subchunks + self.recomputed)
            if not self.pools_vocabulary:  # the cross entropy, and the gather of pooled hidden states
                return blocks + 2, 1
            # All-reduces: pooled representations of each chunk, and the cross entropy. Two all-to-alls of each chunk.
            return blocks + 3 * self.chunks + 1, self.chunks + 1
        # Hidden states, statistics and gradients (an all-to-all) of each subchunk. Top-k: two all-to-alls of each.
        # All-reduces: pooled representations of each chunk; inner products.
        gathers = (3 if self.top_k is None else 5) * self.subchunks + self.recomputed
        if not self.pools_vocabulary:
            return gathers + 1, 0
        sums = self.chunks + (self.subchunks if self.inner_products is None else self.inner_products)
        return gathers + sums, sums

    def _logits(self, head: ResolvedHead) -> float:
        """Return the number of logits on a rank. With the ring head, the rank with the most target tokens counts."""
        return self.padded * self.vocab if head == "gathered" else self.positions * self.vocab / self.ranks

    def flops(self, head: ResolvedHead) -> float:
        """Return the FLOPs of the matrix products of a rank."""
        products = (2 if self.frozen_head else 3) + (self.padded_recomputed / self.padded if self.recomputed else 0)
        return 2 * products * self._logits(head) * self.hidden

    def memory_bytes(self, head: ResolvedHead) -> float:
        """Return the bytes that a rank reads and writes.

        In addition to the passes over the logits, each subchunk reads the head twice (three times if its logits are
        recomputed) and updates its fp32 gradient, unless it is frozen. Each chunk reads the embedding for the pooled
        representations and for their gradients.
        """
        matrix, e = self.vocab * self.hidden, self.element_size
        shards = 1 if head == "gathered" else self.ranks
        of_head = self.subchunks * (2 * e + (0 if self.frozen_head else 8)) + self.recomputed * e
        logits = self.passes * self._logits(head) * e
        return logits + matrix / shards * of_head + matrix / self.ranks * self.chunks * 2 * e

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
        """Bytes that a rank receives to merge the k largest logits of all ranks: k logits and 5 results per position.

        Only with the vocabulary-parallel head. The ring head selects from whole rows.
        """
        if self.top_k is None:
            return 0.0
        return self._remote_fraction * self.positions * (self.top_k * self.element_size + 5 * 4)

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

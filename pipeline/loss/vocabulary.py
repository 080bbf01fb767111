"""Vocabulary rows of one rank: its shards of the LM head and the input embeddings.

Shape letters: V vocabulary, v vocabulary rows of this rank, R ranks, d hidden size.
"""

from dataclasses import dataclass

from torch import Tensor


def partition_rows(padded_size: int, world_size: int) -> int:
    """Return the number of rows in the ZeRO-3 partition of each rank.

    Raises:
        ValueError: padded_size is not divisible by the world size.
    """
    rows, remainder = divmod(padded_size, world_size)
    if remainder:
        raise ValueError(
            f"a padded vocabulary of {padded_size} rows is not divisible by {world_size} ranks: change either"
        )
    return rows


def vocabulary_range(vocab_size: int, padded_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the range [start, end) of unpadded vocabulary rows in the ZeRO-3 partition of a rank. It may be empty.

    ZeRO-3 divides a parameter of P rows into equal flat partitions, so rank r holds rows [r*P/R, (r+1)*P/R).

    Args:
        vocab_size: number of unpadded rows over all ranks.
        padded_size: P, number of rows of the parameter, including padding.
        rank: r.
        world_size: R.

    Raises:
        ValueError: padded_size is not divisible by the world size.
    """
    rows = partition_rows(padded_size, world_size)
    start = min(rank * rows, vocab_size)
    return start, min(start + rows, vocab_size)


@dataclass
class VocabularyShard:
    """Consecutive rows of a vocabulary matrix on this rank, and the accumulator of their gradient.

    Attributes:
        weight: [v, d], without padding rows, in the compute dtype.
        start: vocabulary id of row 0.
        grad: [v, d] accumulator in fp32 (fp64 if the weight is), or None if no gradient is needed.
    """

    weight: Tensor
    start: int
    grad: Tensor | None = None


@dataclass
class Vocabulary:
    """LM head and input embeddings of one model, restricted to this rank's rows.

    Attributes:
        size: V, the unpadded vocabulary size over all ranks.
        head, embedding: shards with the same rows; the same object if they are tied.
        bias, bias_grad: [v] head bias and its accumulator, or None.
        logit_scale: factor of the logits.
        softcap: z -> softcap * tanh(z / softcap), or None.
        weights: [v] vocabulary weights of the soft tokens, or None for 1.
        padded_size: number of rows of the ZeRO-3 parameter, from which the rows of every rank follow (see
            `vocabulary_range`). None if it is `size`.
    """

    size: int
    head: VocabularyShard
    embedding: VocabularyShard
    bias: Tensor | None = None
    bias_grad: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    weights: Tensor | None = None
    padded_size: int | None = None

    def shard_rows(self, ranks: int) -> int:
        """Return the number of rows of each rank's partition, including padding.

        Raises:
            ValueError: the padded size is not divisible by the number of ranks.
        """
        return partition_rows(self.padded_size or self.size, ranks)

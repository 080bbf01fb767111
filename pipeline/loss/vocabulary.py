"""Which rows of the vocabulary a rank holds, and the views of head and embedding on them.

Shape letters: V vocabulary, R ranks, d hidden size.
"""

from dataclasses import dataclass

from torch import Tensor


def vocabulary_range(vocab_size: int, padded_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, end) of the real (unpadded) vocabulary rows in rank's ZeRO-3 piece; end - start may be 0.

    ZeRO-3 cuts a [padded_size, d] parameter into equal flat pieces, so rank r has rows [r*P/R, (r+1)*P/R).

    Raises:
        ValueError: the world size does not divide the padded size.
    """
    rows, remainder = divmod(padded_size, world_size)
    if remainder:
        raise ValueError(f"{world_size} ranks do not divide a padded vocabulary of {padded_size}")
    start = min(rank * rows, vocab_size)
    return start, min(start + rows, vocab_size)


@dataclass
class VocabularyShard:
    """Consecutive rows of a vocabulary matrix on this rank, and where their gradient is summed up.

    Attributes:
        weight: [rows, d], real rows only (no padding), in the compute dtype.
        start: vocabulary id of row 0.
        grad: [rows, d] accumulator in fp32 (or the dtype of the oracle), or None where none is wanted.
    """

    weight: Tensor
    start: int
    grad: Tensor | None = None


@dataclass
class Vocabulary:
    """Head and input embedding of one model on this rank's rows.

    Attributes:
        size: V, the real vocabulary size over all ranks.
        head, embedding: shards with the same rows; the same object where the model ties them.
        bias, bias_grad: [rows] head bias and its accumulator, for families that have one.
        logit_scale: factor of the logits. softcap: z -> softcap * tanh(z / softcap), where given.
        weights: [rows] vocabulary weights of the soft tokens, or None for 1.
    """

    size: int
    head: VocabularyShard
    embedding: VocabularyShard
    bias: Tensor | None = None
    bias_grad: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    weights: Tensor | None = None

"""Tensors of one subchunk that are kept between the forward and the backward pass of its softmax.

Shape letters: C rows (target tokens) of the subchunk, v vocabulary rows of this rank (columns of the logits),
n sequences of the chunk, m of them whose pooled representations require a gradient, d hidden size.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.loss.kernels import SubchunkTokens


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of the rows of a subchunk over the whole vocabulary, [C] each.

    Attributes:
        cross_entropy: -log p(target).
        scale, tempered_scale: factors that convert `e` and `tempered` of `SoftmaxState` to probabilities.
        target, tempered_target: `e` and `tempered` at the target before rounding, if that column is on this rank.
    """

    cross_entropy: Tensor
    scale: Tensor
    tempered_scale: Tensor
    target: Tensor
    tempered_target: Tensor


@dataclass(frozen=True)
class SoftmaxState:
    """Unnormalized softmax of a subchunk on this rank's columns.

    Attributes:
        tokens: the target tokens, one per row.
        hidden: [C, d] hidden states, multiplied by the logit scale.
        e: [C, v] proportional to exp(z) in each row; overwritten by dz in the backward pass.
        e_buffer: [C + n, v] buffer of `e`; n is 0 unless head and embedding are tied.
        tempered: [C, v] proportional to exp(z / temperature); `e` itself if the temperature is 1.
        cap_derivative: [C, v] derivative of the soft cap, or None.
        statistics: statistics of the rows.
    """

    tokens: SubchunkTokens
    hidden: Tensor
    e: Tensor
    e_buffer: Tensor
    tempered: Tensor
    cap_derivative: Tensor | None
    statistics: RowStatistics


@dataclass(frozen=True)
class SoftGradient:
    """Factors of the embedding's gradient, pooled^T grad_u, over the m sequences that require a gradient.

    Attributes:
        pooled: [m, v] pooled probabilities.
        grad_u: [m, d] gradient of the pooled representations.
    """

    pooled: Tensor
    grad_u: Tensor

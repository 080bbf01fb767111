"""Tensors of one subchunk that are kept between the forward and the backward pass of its softmax.

Shape letters: C rows (target tokens) of the subchunk, v vocabulary rows of this rank (columns of the logits),
n sequences of the chunk, m of them whose pooled representations require a gradient, d hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .comm import Group, all_gather
from .kernels import SubchunkTokens
from .top_k import TopKMixture, TopKStatistics, merge

# Lower bound of the log of the factor of a row's exponentials. Below it, dz at the target would overflow fp32.
SMALLEST_LOG_SCALE = -80.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for half precisions, or else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of the rows of a subchunk over the whole vocabulary, [C] each.

    Attributes:
        cross_entropy: -log p(target).
        scale, tempered_scale: factors that convert `e` and `tempered` of `SoftmaxState` to probabilities.
        target, tempered_target: `e` and `tempered` at the target before rounding, if that column is on this rank.
        log_sum: log-sum-exp of z.
        top_k: statistics of the k largest logits, or None if soft tokens mix the whole vocabulary.
    """

    cross_entropy: Tensor
    scale: Tensor
    tempered_scale: Tensor
    target: Tensor
    tempered_target: Tensor
    log_sum: Tensor
    top_k: TopKStatistics | None

    @classmethod
    def over_ranks(
        cls,
        target: Tensor,
        sums: tuple[Tensor, Tensor],
        tempered_sums: tuple[Tensor, Tensor],
        top_k: tuple[Tensor, int] | None,
        temperature: float,
        group: Group,
    ) -> "RowStatistics":
        """Combine the statistics of all ranks.

        Args:
            target: [C] target logit, 0 if its column is not on this rank.
            sums, tempered_sums: [C] log-sum-exp and [C] row sum of this rank, as returned by `softmax_`.
            top_k: [C, j] largest logits of this rank, and k. None if soft tokens mix the whole vocabulary.
            temperature: divisor of the logits in the soft tokens' softmax.
            group: the ranks that hold the columns.
        """
        (log_sum, total), (tempered_log_sum, tempered_total) = sums, tempered_sums
        ranks = all_gather(torch.stack([log_sum, tempered_log_sum, target]), group)
        global_log_sum, tempered_global_log_sum = ranks[:, :2].logsumexp(0)
        return cls(
            cross_entropy=global_log_sum - ranks[:, 2].sum(0),
            scale=(log_sum - global_log_sum - total.log()).clamp_min(SMALLEST_LOG_SCALE).exp(),
            tempered_scale=(tempered_log_sum - tempered_global_log_sum).exp() / tempered_total,
            target=(target - log_sum).exp() * total,
            tempered_target=(target / temperature - tempered_log_sum).exp() * tempered_total,
            log_sum=global_log_sum,
            top_k=None if top_k is None else merge(*top_k, temperature, group),
        )

    def stacked(self) -> Tensor:
        """Return the cross entropy as [1, C]; with top-k, [3, C]: cross entropy, kept mass, entropy of the soft token.

        The kept mass is the probability that the k largest logits have in the softmax of all logits.
        """
        if self.top_k is None:
            return self.cross_entropy[None]
        kept_mass = (self.top_k.largest - self.log_sum).exp() * self.top_k.mass
        return torch.stack([self.cross_entropy, kept_mass, self.top_k.entropy])


@dataclass(frozen=True)
class SoftmaxState:
    """Unnormalized softmax of a subchunk on this rank's columns.

    Attributes:
        tokens: the target tokens, one per row.
        target_columns: [C, 1] local column of each target; any valid column if it is on another rank.
        target_is_local: [C] whether it is on this rank.
        hidden: [C, d] hidden states, multiplied by the logit scale.
        e: [C, v] proportional to exp(z) in each row; overwritten by dz in the backward pass.
        e_buffer: [C + n, v] buffer of `e`; n is 0 unless head and embedding are tied.
        tempered: [C, v] proportional to exp(z / temperature); `e` itself if the temperature is 1 or with top-k.
        cap_derivative: [C, v] derivative of the soft cap, or None.
        statistics: statistics of the rows.
        mixture: probabilities of the k largest logits or, with hard tokens, of the targets. None if soft tokens mix the
            whole vocabulary.
    """

    tokens: SubchunkTokens
    target_columns: Tensor
    target_is_local: Tensor
    hidden: Tensor
    e: Tensor
    e_buffer: Tensor
    tempered: Tensor
    cap_derivative: Tensor | None
    statistics: RowStatistics
    mixture: TopKMixture | None


@dataclass(frozen=True)
class SoftGradient:
    """Factors of the alignment gradient of the embedding, over the m sequences that require a gradient.

    The gradient is grad_scale * alignment_factor * pooled^T grad_u.

    Attributes:
        pooled: [m, v] pooled probabilities.
        grad_u: [m, d] gradient of the sum of distances with respect to the pooled representations.
        grad_u_of_parts: `grad_u` of each part of a sequence that requires a gradient, if ranks share rows, or `grad_u`.
        columns: columns of `pooled` in use, or None for all; see `embedding_products.used_columns`.
    """

    pooled: Tensor
    grad_u: Tensor
    grad_u_of_parts: Tensor
    columns: Tensor | None

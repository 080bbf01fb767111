"""Alignment of the pooled hidden states of a middle decoder layer, as in mid-align (arXiv 2502.14830).

No logits take part in it, so it is computed beside the cross entropy: each rank pools its own sequences, the pooled
representations are gathered, and every rank computes the distances of all pairs and keeps the gradient of its own rows.

Shape letters: T target tokens of this rank, n sequences of this rank, S sequences of all ranks, d hidden size.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .alignment import PooledRepresentations, RunningMeans
from .chunking import Chunk
from .comm import Group, all_gather, rank_and_size
from .indexing import bounds, ranges, upload
from .layout import LayoutExchange
from .loss_batch import LossBatch, LossNormalizers
from .settings import LossSettings
from .softmax_state import accumulation_dtype
from .vocab_parallel import SolarLoss
from .with_gradient import WithGradient


def add_hidden_state_alignment(
    result: SolarLoss,
    hidden: Tensor,
    loss_batch: LossBatch,
    settings: LossSettings,
    alignment_weight: float,
    normalizers: LossNormalizers,
    running_means: RunningMeans | None = None,
    group: Group = None,
) -> None:
    """Add alignment_weight * alignment / normalizers.pairs and its parts to a loss, in place.

    Collective: all ranks must call it. Without pairs in the global batch, it does nothing.

    Args:
        result: the result of `solar_loss` for the same micro-batch and settings.
        hidden: [T, d] hidden states of the middle layer at the positions that predict this rank's target tokens. Their
            gradient is that of the global loss, as in `solar_loss`.
        loss_batch: layout of the target tokens, on the host.
        settings: settings of the loss.
        alignment_weight: weight of the alignment loss at this step.
        normalizers: counts of the global batch.
        running_means: means to subtract from the pooled representations. They are updated with this micro-step, unless
            grad mode is disabled. None to disable centering.
        group: process group, or None for a single process; see `solar_loss`.
    """
    if not normalizers.pairs:
        return
    layout = loss_batch.layout
    if layout is None:
        (layout,), _ = LayoutExchange(group).exchange([loss_batch], settings.pooling, hidden.device)
    if not len(layout.lengths):  # no rank has a sequence in this micro-step
        return
    pooled = pool_hidden_states(hidden, loss_batch, settings.pooling)
    weight, training = alignment_weight / normalizers.pairs, torch.is_grad_enabled()
    chunk = Chunk((), bounds(layout.sequence_counts))
    table = PooledRepresentations(layout, [chunk], hidden.shape[1], pooled.dtype, settings)
    with torch.no_grad():
        of_all = _gather_sequences(pooled, layout.sequence_counts, group)
        table.sum_parts(0, of_all)
        grad_u = table.align(0, of_all, running_means, weight if training else 0.0)
    result.distance_sum, result.cosine_sum = table.distance_sum, table.cosine_sum
    if alignment_weight:
        result.loss = result.loss + table.distance_sum * weight
    if grad_u is not None:
        grad = torch.zeros_like(of_all).index_copy_(0, table.requires_grad[0], grad_u)
        if layout.first_part is not None:
            (first_part,) = upload([layout.first_part], grad.device)
            grad = grad[first_part]
        own = grad[chunk.sequences_of_rank(rank_and_size(group)[0])]
        result.loss = WithGradient.apply(pooled, result.loss, own, 1.0)
    if running_means is not None and training:
        running_means.update(table.values, table.language, table.counted, settings.centring_momentum)


def pool_hidden_states(hidden: Tensor, loss_batch: LossBatch, pooling: str) -> Tensor:
    """Return the [n, d] sums of the hidden states of each sequence, weighted as `pooling` says. Differentiable.

    Args:
        hidden: [T, d].
        loss_batch: layout of the target tokens.
        pooling: `mean`, `last` or `weights`.
    """
    dtype, loss_batch = accumulation_dtype(hidden.dtype), loss_batch.to("cpu")
    (sequence,) = upload([loss_batch.sequence_of_token()], hidden.device)
    (weights,) = upload([loss_batch.pooling_weights(pooling, dtype)], hidden.device)
    numbers = torch.arange(len(loss_batch.lengths), device=hidden.device)
    # A matrix product is deterministic on a GPU, unlike index_add.
    return torch.where(sequence == numbers[:, None], weights, 0) @ hidden.to(dtype)


def _gather_sequences(rows: Tensor, counts: Tensor, group: Group) -> Tensor:
    """Gather [n, d] rows, of which the ranks have different numbers, into [S, d], ordered by rank.

    Args:
        rows: the rows of this rank.
        counts: [R] number of rows of each rank, on the host.
    """
    longest = int(counts.max())
    gathered = all_gather(pad(rows, (0, 0, 0, longest - len(rows))), group).flatten(0, 1)
    (index,) = upload([ranges(torch.arange(len(counts)) * longest, counts)], rows.device)
    return gathered[index]

"""The sharded loss on given hidden states, for the ranks of `tests.workers`. Imports only what these need."""

import torch
from torch import Tensor

from pipeline.loss import (
    LossBatch,
    LossNormalizers,
    LossSettings,
    Vocabulary,
    VocabularyShard,
    solar_loss,
    vocabulary_range,
)
from pipeline.loss.comm import Group, rank_and_size


def loss_gradients(
    group: Group,
    hidden: list[Tensor],
    loss_batches: list[LossBatch],
    head: Tensor,
    settings: LossSettings,
    normalizers: LossNormalizers,
    languages: int,
) -> dict[str, Tensor]:
    """Compute the loss with a tied head, this rank's gradients, and the cross entropy by language.

    Args:
        hidden, loss_batches: hidden states and layout of each rank.
        head: [V, d] head and input embedding; V is a multiple of the number of ranks.
    """
    rank, size = rank_and_size(group)
    start, end = vocabulary_range(len(head), len(head), rank, size)
    shard = VocabularyShard(head[start:end].clone(), start, torch.zeros_like(head[start:end]))
    vocabulary = Vocabulary(len(head), shard, shard)
    states = hidden[rank].clone().requires_grad_()
    result = solar_loss(
        states, loss_batches[rank], vocabulary, settings, 1.0, normalizers, languages, group=group if size > 1 else None
    )
    result.loss.backward()
    assert states.grad is not None and shard.grad is not None
    return {
        "loss": result.loss.detach(),
        "hidden": states.grad,
        "head": shard.grad,
        "language_ce": result.language_ce / result.language_tokens,
    }

"""The SOLAR loss as a page of obvious code: dense, differentiable by autograd, any dtype. The oracle of all tests.

Shape letters: T supervised positions, S sequences, V vocabulary, d hidden size, L languages.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from pipeline.loss.loss_batch import LossBatch, LossNormalizers
from pipeline.loss.settings import LossSettings


def solar_loss_reference(
    hidden: Tensor,
    head: Tensor,
    embedding: Tensor,
    loss_batch: LossBatch,
    settings: LossSettings,
    alignment_weight: float,
    normalizers: LossNormalizers,
    running_means: Tensor | None = None,
    vocabulary_weights: Tensor | None = None,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy + weight * alignment, with all [T, V] and [T, d] intermediates in memory.

    Args:
        hidden: [T, d] final hidden states at the supervised positions of the whole global micro-step.
        head, embedding: [V, d]; the same tensor where tied. head_bias: [V].
        supervised: layout of those positions, for all ranks together.
        centres: [L, d] running mean summaries, subtracted where given. vocabulary_weights: [V].

    Returns:
        loss, cross-entropy part, alignment part before its weight; scalars.
    """
    z_TV = logit_scale * (hidden @ head.T)
    if head_bias is not None:
        z_TV = z_TV + head_bias
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    sequence = loss_batch.sequence_of_token()

    ce_T = cross_entropy(z_TV, loss_batch.targets, reduction="none")
    if loss_batch.ce_weights is not None:
        ce_T = ce_T * loss_batch.ce_weights[sequence]
    ce = ce_T.sum() / normalizers.tokens

    p_TV = torch.softmax(z_TV / settings.softmax_temperature, dim=-1)
    if "probabilities" in settings.detach:
        p_TV = p_TV.detach()
    e_Vd = embedding.detach() if "embeddings" in settings.detach else embedding
    if vocabulary_weights is not None:
        e_Vd = vocabulary_weights[:, None] * e_Vd
    soft_Td = p_TV @ e_Vd

    weight_T = loss_batch.pooling_weights(settings.pooling, hidden.dtype)
    u = [(weight_T[sequence == i, None] * soft_Td[sequence == i]).sum(0) for i in range(len(loss_batch.lengths))]
    if running_means is not None:
        u = [u_i - running_means[language] for u_i, language in zip(u, loss_batch.language.tolist(), strict=True)]
    is_pivot = [p == i for i, p in enumerate(loss_batch.pivot.tolist())]
    if "pivot" in settings.detach:
        u = [u_i.detach() if pivot else u_i for u_i, pivot in zip(u, is_pivot, strict=True)]

    distances = [
        _distance(i, u, loss_batch, settings) for i, paired in enumerate(loss_batch.paired().tolist()) if paired
    ]
    alignment = torch.stack(distances).sum() / normalizers.pairs if distances else ce.new_zeros(())
    return ce + alignment_weight * alignment, ce, alignment


def _distance(i: int, u: list[Tensor], loss_batch: LossBatch, settings: LossSettings) -> Tensor:
    """D(u_i, u_pivot(i)): a scalar."""
    pivot = int(loss_batch.pivot[i])
    if settings.distance == "cosine":
        return 1 - cosine_similarity(u[i], u[pivot], dim=0)
    if settings.distance == "mse":
        return ((u[i] - u[pivot]) ** 2).mean()
    # InfoNCE: the pivot against the summaries of all other problems, in any language.
    problem, nonempty = loss_batch.problem.tolist(), (loss_batch.lengths > 0).tolist()
    others = [j for j in range(len(u)) if problem[j] != problem[i] and nonempty[j]]
    similarities = torch.stack([cosine_similarity(u[i], u[j], dim=0) for j in [pivot, *others]])
    return -torch.log_softmax(similarities / settings.infonce_temperature, dim=0)[0]

"""Dense reference implementation of the SOLAR loss, differentiable by autograd in any dtype.

Shape letters: T target tokens, S sequences, V vocabulary, d hidden size, L languages.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from .loss_batch import LossBatch, LossNormalizers
from .settings import LossSettings
from .soft_tokens import head_logits, soft_tokens


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
    layer_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cross entropy + alignment_weight * alignment, holding all [T, V] and [T, d] intermediates in memory.

    Args:
        hidden: [T, d] final hidden states that predict the target tokens of all ranks' micro-batches.
        head, embedding: [V, d] matrices; the same tensor if tied.
        loss_batch: layout of the target tokens of all ranks together.
        normalizers: divisors of the two terms.
        running_means: [L, d] running means to subtract from the pooled representations, or None.
        vocabulary_weights: [V] weights in the soft tokens, or None for 1.
        head_bias: [V] or None.
        logit_scale, softcap: see `pipeline.loss.soft_tokens.head_logits`.
        layer_hidden: [T, d] hidden states of a middle layer, for `pooling_tokens: hidden_states`.

    Returns:
        Three scalars: the loss, the cross entropy, and the unweighted alignment term.

    Raises:
        ValueError: pooling is `weights` and `loss_batch` has no token weights.
    """
    z_TV = head_logits(hidden, head, head_bias, logit_scale, softcap)
    sequence = loss_batch.sequence_of_token()
    ce_T = cross_entropy(z_TV, loss_batch.targets, reduction="none")
    if loss_batch.ce_weights is not None:
        ce_T = ce_T * loss_batch.ce_weights[sequence]
    ce = ce_T.sum() / normalizers.tokens

    if settings.pooling_tokens == "hidden_states":
        assert layer_hidden is not None
        tokens_Td = layer_hidden
    else:
        tokens_Td = _vocabulary_tokens(z_TV, head, embedding, loss_batch, settings, vocabulary_weights)
    weight_T = loss_batch.pooling_weights(settings.pooling, hidden.dtype)
    u = [(weight_T[sequence == i, None] * tokens_Td[sequence == i]).sum(0) for i in range(len(loss_batch.lengths))]
    if running_means is not None:
        u = [u_i - running_means[language] for u_i, language in zip(u, loss_batch.language.tolist(), strict=True)]
    is_pivot = [p == i for i, p in enumerate(loss_batch.pivot.tolist())]
    if "pivot" in settings.detach:
        u = [u_i.detach() if pivot else u_i for u_i, pivot in zip(u, is_pivot, strict=True)]

    paired = loss_batch.paired().tolist()
    distances = [_distance(i, u, loss_batch, settings) for i in range(len(u)) if paired[i]]
    alignment = torch.stack(distances).sum() / normalizers.pairs if distances else ce.new_zeros(())
    return ce + alignment_weight * alignment, ce, alignment


def _vocabulary_tokens(
    z_TV: Tensor,
    head: Tensor,
    embedding: Tensor,
    loss_batch: LossBatch,
    settings: LossSettings,
    vocabulary_weights: Tensor | None,
) -> Tensor:
    """Return the [T, d] soft tokens, or the embeddings of the target tokens (`hard`)."""
    z_TV = z_TV.detach() if "probabilities" in settings.detach else z_TV
    e_Vd = head if settings.soft_token_embeddings == "output" else embedding
    e_Vd = e_Vd.detach() if "embeddings" in settings.detach else e_Vd
    if settings.pooling_tokens == "soft":
        return soft_tokens(z_TV, e_Vd, settings.softmax_temperature, vocabulary_weights, settings.top_k)
    weighted_Vd = e_Vd if vocabulary_weights is None else vocabulary_weights[:, None] * e_Vd
    return weighted_Vd[loss_batch.targets]


def _distance(i: int, u: list[Tensor], loss_batch: LossBatch, settings: LossSettings) -> Tensor:
    """Compute the scalar distance D(u_i, u_pivot(i))."""
    pivot = int(loss_batch.pivot[i])
    if settings.distance == "cosine":
        return 1 - cosine_similarity(u[i], u[pivot], dim=0)
    if settings.distance == "mse":
        return ((u[i] - u[pivot]) ** 2).mean()
    # InfoNCE: the pivot is the positive. The negatives are the sequences of all other problems, in any language.
    problem_id, nonempty = loss_batch.problem_id.tolist(), (loss_batch.lengths > 0).tolist()
    others = [j for j in range(len(u)) if problem_id[j] != problem_id[i] and nonempty[j]]
    similarities = torch.stack([cosine_similarity(u[i], u[j], dim=0) for j in [pivot, *others]])
    return -torch.log_softmax(similarities / settings.infonce_temperature, dim=0)[0]

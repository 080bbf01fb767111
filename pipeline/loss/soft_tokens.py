"""Dense logits and soft tokens in plain torch.

Shape letters: T positions, S sequences, V vocabulary, d hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def head_logits(
    hidden_Td: Tensor,
    head_Vd: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the logits of an LM head, including the scale, bias and soft cap of some model families.

    Args:
        hidden_Td: [T, d] final hidden states.
        head_Vd: [V, d] LM head, in the dtype of `hidden_Td`.
        bias_V: [V] head bias, or None.
        scale: factor of the matrix product, applied before the bias.
        softcap: z -> softcap * tanh(z / softcap), or None.
        dtype: dtype that the matrix product is converted to, or None to keep its dtype.

    Returns:
        [T, V] logits.
    """
    z_TV = hidden_Td @ head_Vd.T
    if dtype is not None:
        z_TV = z_TV.to(dtype)
    if scale != 1:
        z_TV = scale * z_TV
    if bias_V is not None:
        z_TV = z_TV + bias_V
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    return z_TV


def soft_token_probabilities(logits_TV: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """Compute softmax(z_t / temperature) over the k largest logits, and 0 elsewhere. Differentiable.

    Args:
        logits_TV: [T, V] logits z.
        temperature: divisor of the logits.
        top_k: number of logits, or None for all. Among equal logits, those with the lower id are selected.

    Returns:
        [T, V] probabilities.
    """
    if top_k is not None:
        selected = logits_TV.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        others = torch.ones_like(logits_TV, dtype=torch.bool).scatter(1, selected, False)
        logits_TV = logits_TV.masked_fill(others, -torch.inf)
    if temperature != 1:
        logits_TV = logits_TV / temperature
    return torch.softmax(logits_TV, dim=-1)


def soft_tokens(
    logits_TV: Tensor,
    embedding_Vd: Tensor,
    temperature: float = 1.0,
    vocabulary_weights_V: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Compute s_t = sum over v of w_v p_t(v) E_v with p_t from `soft_token_probabilities`. Differentiable.

    Args:
        logits_TV: [T, V] logits z.
        embedding_Vd: [V, d] embeddings E. The probabilities are converted to the dtype of E.
        temperature: divisor of the logits.
        vocabulary_weights_V: [V] weights w, or None for 1.
        top_k: number of largest logits to mix, or None for all.

    Returns:
        [T, d] soft tokens.
    """
    p_TV = soft_token_probabilities(logits_TV, temperature, top_k)
    if vocabulary_weights_V is not None:
        embedding_Vd = vocabulary_weights_V[:, None] * embedding_Vd
    return p_TV.to(embedding_Vd.dtype) @ embedding_Vd


def mean_soft_tokens(
    logit_chunks: Iterable[Tensor], sequence_T: Tensor, num_sequences: int, embedding_Vd: Tensor, rows_at_once: int
) -> Tensor:
    """Compute the mean soft token of each sequence in fp32, without any [T, V] or [T, d] tensor.

    The mean of the products p_t E equals the product of the mean of p_t with E, so only one row per sequence is
    multiplied by E.

    Args:
        logit_chunks: [chunk, V] logits of consecutive positions that together cover all T positions.
        sequence_T: [T] int64 sequence index of each position. No sequence may be empty.
        num_sequences: S.
        embedding_Vd: [V, d] input embeddings, in any floating-point dtype.
        rows_at_once: number of embedding rows to convert to fp32 at a time.

    Returns:
        [S, d] fp32.
    """
    pooled_SV = torch.zeros(num_sequences, len(embedding_Vd), device=sequence_T.device)
    start = 0
    for logits in logit_chunks:
        pooled_SV.index_add_(0, sequence_T[start : start + len(logits)], torch.softmax(logits, dim=-1))
        start += len(logits)
    pooled_SV /= torch.bincount(sequence_T, minlength=num_sequences)[:, None]
    u_Sd = torch.zeros(num_sequences, embedding_Vd.shape[1], device=sequence_T.device)
    for p, e in zip(pooled_SV.split(rows_at_once, dim=1), embedding_Vd.split(rows_at_once), strict=True):
        u_Sd = u_Sd + p @ e.float()
    return u_Sd

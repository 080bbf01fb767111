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


def soft_tokens(
    logits_TV: Tensor, embedding_Vd: Tensor, temperature: float = 1.0, vocabulary_weights_V: Tensor | None = None
) -> Tensor:
    """Compute s_t = sum over v of w_v p_t(v) E_v with p_t = softmax(z_t / temperature). Differentiable.

    Args:
        logits_TV: [T, V] logits z.
        embedding_Vd: [V, d] input embeddings E. The probabilities are converted to the dtype of E.
        temperature: divisor of the logits.
        vocabulary_weights_V: [V] weights w, or None for 1.

    Returns:
        [T, d] soft tokens.
    """
    if temperature != 1:
        logits_TV = logits_TV / temperature
    p_TV = torch.softmax(logits_TV, dim=-1)
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

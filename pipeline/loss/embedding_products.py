"""Products of the pooled probabilities of a few sequences with the embedding, and of their gradients.

Their time is that of reading the embedding. With top-k or target tokens, only few columns of a sequence have a
probability, and a CPU reads only their rows.

Shape letters: n sequences of the chunk, m of them whose pooled representations require a gradient, v vocabulary rows of
this rank, u of them in use, d hidden size.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .kernels import PARTS, row_stride, row_tiles


def used_columns(pooled_mv: Tensor) -> Tensor | None:
    """Return the [u] columns in which a sequence has a probability, or None to use all.

    None if at least half of them are in use, and on a GPU, because their number would have to be copied to the host.
    """
    if pooled_mv.is_cuda:
        return None
    columns = pooled_mv.any(0).nonzero().squeeze(1)
    return columns if 2 * len(columns) < pooled_mv.shape[1] else None


def times_embedding(pooled_nv: Tensor, embedding_vd: Tensor, sparse: bool) -> Tensor:
    """Compute pooled @ embedding, [n, d], in the dtype of the embedding.

    `sparse` says that most probabilities may be 0. If fewer than v / 2 are not, a CPU reads one row for each of these.
    """
    pooled_nv, (n, v) = pooled_nv.to(embedding_vd.dtype), pooled_nv.shape
    if sparse and not pooled_nv.is_cuda:
        sequence, column = pooled_nv.nonzero(as_tuple=True)
        if 2 * len(column) < v:
            firsts, weights = torch.searchsorted(sequence, torch.arange(n)), pooled_nv[sequence, column]
            return embedding_bag(column, embedding_vd, firsts, mode="sum", per_sample_weights=weights)
    if pooled_nv.is_cuda or v % PARTS:
        return pooled_nv @ embedding_vd
    by_part = torch.bmm(pooled_nv.view(n, PARTS, -1).transpose(0, 1), embedding_vd.unflatten(0, (PARTS, -1)))
    return by_part.sum(0)


def times_embedding_transposed(grad_u_md: Tensor, embedding_vd: Tensor, columns_u: Tensor | None) -> Tensor:
    """Compute grad_u @ embedding^T, [m, v], in the used columns; the others are 0.

    Rows have the stride of `kernels.row_stride`.
    """
    m, v = len(grad_u_md), len(embedding_vd)
    out = embedding_vd.new_empty(m, row_stride(v, embedding_vd.is_cuda))[:, :v]
    if columns_u is not None:
        out.zero_()
        for tile in row_tiles(embedding_vd, 0, len(columns_u)):
            columns = columns_u[tile]
            out.index_copy_(1, columns, (embedding_vd.index_select(0, columns) @ grad_u_md.T).T)
        return out
    if embedding_vd.is_cuda:
        return torch.mm(grad_u_md, embedding_vd.T, out=out)
    return out.copy_((embedding_vd @ grad_u_md.T).T)  # read only once, at memory bandwidth, as the left factor


def add_gradient_(grad_vd: Tensor, pooled_mv: Tensor, grad_u_md: Tensor, columns_u: Tensor, alpha: float) -> None:
    """Add alpha * pooled^T grad_u to the gradient of the embedding, in the rows of the used columns."""
    for tile in row_tiles(grad_vd, 0, len(columns_u)):
        columns = columns_u[tile]
        rows = pooled_mv.index_select(1, columns).T @ grad_u_md
        grad_vd.index_add_(0, columns, rows.to(grad_vd.dtype), alpha=alpha)

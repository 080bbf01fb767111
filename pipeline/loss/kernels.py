"""Elementwise and reduction passes over the logits of one subchunk, in place.

On a GPU the functions call the kernels in `triton_kernels` and `triton_softmax`, except for float64 tensors.

Shape letters, also used as suffixes of tensor names (`z_Cv` has the shape [C, v]):

    C  rows of the logits: the target tokens of the subchunk
    v  columns of the logits: the vocabulary rows of this rank
    n  sequences of the chunk
    m  sequences of the chunk whose pooled representations require a gradient
    d  hidden size

Rows of z, e, p, q and grad_probs may have a stride larger than v; see `row_stride`. The storage then holds the
elements after each row, and functions that change the rows in place may change these elements.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

if (torch.version.cuda or torch.version.hip) and find_spec("triton"):
    from . import triton_kernels, triton_softmax

CACHE_BYTES = 1 << 20  # size of a tile of rows that fits the L2 cache of a CPU core
GPU_TILE_BYTES = 1 << 26  # size of a tile of rows on a GPU: few launches, and little memory beside the logits
PARTS = 8  # batch size to split a product with few rows into, because a CPU only parallelizes over the batch
# Rows of the logits begin at multiples of this number of elements. Matrix products and Triton's loads need rows aligned
# to 16 bytes to be fast, and whole cache lines are 128 bytes.
ROW_ALIGNMENT = 64
# Rows whose distance is a multiple of this number of fp32 elements (4 KiB) use the same sets of a CPU's L1 cache, which
# slows down products 1 and 3.
SAME_CACHE_SETS = 1024
MAX_SELECTED = 64  # logits of a row that the GPU kernel selects; at most the blocks of one of its lines


@dataclass(frozen=True)
class SubchunkTokens:
    """The target tokens of a subchunk, one per row of its logits.

    Attributes:
        targets: [C] target id.
        pooling_weights: [C] weight in the pooled representation.
        ce_weights: [C] weight in the cross entropy.
        any_without_ce: whether any of them is 0, on the host.
        sequence: [C] index of the sequence within the chunk.
        grad_index: [C] index of the sequence among the m that require a gradient, or -1.
        edges: [n + 1] rows [edges[i], edges[i + 1]) belong to sequence i of the chunk, on the host.
        grad_index_of_sequence: [n] the same index per sequence of the chunk, on the host.
    """

    targets: Tensor
    pooling_weights: Tensor
    ce_weights: Tensor
    any_without_ce: bool
    sequence: Tensor
    grad_index: Tensor
    edges: Tensor
    grad_index_of_sequence: Tensor

    @cached_property
    def spans(self) -> list[tuple[slice, int, int]]:
        """Rows, index and `grad_index` of each sequence with rows. CPU kernels take one sequence at a time."""
        edges, grad_indices = self.edges.tolist(), self.grad_index_of_sequence.tolist()
        rows = itertools.starmap(slice, itertools.pairwise(edges))
        return [(span, i, grad_indices[i]) for i, span in enumerate(rows) if span.stop > span.start]


def row_stride(columns: int, gpu: bool) -> int:
    """Return the number of elements between rows of `columns` elements, which keeps all rows aligned."""
    stride = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return stride + ROW_ALIGNMENT if not gpu and stride % SAME_CACHE_SETS == 0 else stride


def row_tiles(z: Tensor, start: int, stop: int) -> Iterator[slice]:
    """Divide the rows [start, stop) into consecutive slices, which on a CPU fit the cache."""
    tile_bytes = GPU_TILE_BYTES if z.is_cuda else CACHE_BYTES
    rows = max(1, tile_bytes // max(1, z.shape[1] * z.element_size()))
    return (slice(first, min(first + rows, stop)) for first in range(start, stop, rows))


def _use_triton(z: Tensor) -> bool:
    return z.is_cuda and z.dtype != torch.float64 and z.numel() > 0


def softmax_(z_Cv: Tensor, temperature: float, largest_Ck: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replace z by softmax(z / temperature) over these columns, up to a factor per row that is chosen for precision.

    Args:
        z_Cv: [C, v] logits, overwritten. They begin at column 0 of their buffer, see above.
        temperature: divisor of the logits.
        largest_Ck: [C, k] largest logits of each row, largest first, or None. Saves a pass; only with temperature 1.

    Returns:
        [C] log-sum-exp of z / temperature, and [C] sum of each row of the new z. Both are fp32, or fp64 if z is fp64.
    """
    dtype = torch.promote_types(z_Cv.dtype, torch.float32)
    log_sum, total = (z_Cv.new_empty(len(z_Cv), dtype=dtype) for _ in range(2))
    if z_Cv.shape[1] == 0:
        return log_sum.fill_(-torch.inf), total.fill_(1)
    if _use_triton(z_Cv):
        return triton_softmax.softmax_(z_Cv, temperature)
    if z_Cv.dtype == dtype:
        if temperature != 1:
            z_Cv.div_(temperature)
        largest = z_Cv.amax(1) if largest_Ck is None else largest_Ck[:, 0]
        stride = max(z_Cv.stride(0), z_Cv.shape[1])
        whole = z_Cv.as_strided((len(z_Cv), stride), (stride, 1))
        whole[:, z_Cv.shape[1] :] = -torch.inf  # torch.softmax would copy rows that are not contiguous
        torch.softmax(whole, 1, out=whole)
        # The largest entry of a softmax is 1 / sum(exp(z - max)).
        return largest - z_Cv.amax(1).log(), total.fill_(1)
    for tile in row_tiles(z_Cv, 0, len(z_Cv)):
        # Half-precision tensors store exp(z - max), which is within their range.
        wide = z_Cv[tile].to(dtype) / temperature
        largest = wide.amax(1)
        total[tile] = wide.sub_(largest[:, None]).exp_().sum(1)
        log_sum[tile] = largest + total[tile].log()
        z_Cv[tile] = wide
    return log_sum, total


def softmax_with_largest_(z_Cv: Tensor, k: int, block: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor] | None:
    """Select the k largest logits of each row on a GPU, largest first, and replace z as `softmax_` does.

    Among equal logits, the lower column is first.

    Returns:
        The result of `softmax_`, and the [C, k] values and columns, or None if `top_k.largest_logits` must select: on a
        CPU, for fp64, and if k exceeds `MAX_SELECTED` or the number of whole blocks.
    """
    if not _use_triton(z_Cv) or k > MAX_SELECTED or z_Cv.shape[1] < k * block:
        return None
    return triton_softmax.softmax_with_largest_(z_Cv, k, block)


def softcap_(z_Cv: Tensor, softcap: float, derivative_Cv: Tensor) -> Tensor:
    """Replace z by softcap * tanh(z / softcap).

    Args:
        z_Cv: [C, v] logits, overwritten.
        softcap: bound of the new logits.
        derivative_Cv: [C, v] buffer that receives the derivative, 1 - tanh^2.

    Returns:
        `derivative_Cv`.
    """
    z_Cv.div_(softcap).tanh_()
    torch.mul(z_Cv, z_Cv, out=derivative_Cv).neg_().add_(1)
    z_Cv.mul_(softcap)
    return derivative_Cv


def pool(p_Cv: Tensor, weight_C: Tensor, tokens: SubchunkTokens) -> Tensor:
    """Compute [n, v]: the sum of weight * p over the rows of each sequence, in the dtype of the weights."""
    if _use_triton(p_Cv):
        return triton_kernels.pool(p_Cv, weight_C, tokens.sequence, len(tokens.grad_index_of_sequence))
    pooled = weight_C.new_zeros(len(tokens.grad_index_of_sequence), p_Cv.shape[1])
    weight_C = weight_C.to(p_Cv.dtype)
    parts = PARTS if p_Cv.shape[1] % PARTS == 0 else 1
    for rows, sequence, _ in tokens.spans if pooled.numel() else ():
        columns = p_Cv[rows].unflatten(1, (parts, -1)).transpose(0, 1)
        pooled[sequence] = torch.bmm(weight_C[rows].expand(parts, 1, -1), columns).flatten()
    return pooled


def inner_products(p_Cv: Tensor, grad_probs_mv: Tensor, tokens: SubchunkTokens) -> Tensor:
    """Compute [C]: <p, grad_probs> in rows of sequences that require a gradient, and 0 in all other rows."""
    if _use_triton(p_Cv):
        return triton_kernels.inner_products(p_Cv, grad_probs_mv, tokens.grad_index)
    inner = torch.zeros_like(tokens.pooling_weights)
    for rows, _, index in tokens.spans if p_Cv.numel() else ():
        if index >= 0:
            inner[rows] = p_Cv[rows] @ grad_probs_mv[index].to(p_Cv.dtype)
    return inner


def softmax_backward_(
    e_Cv: Tensor,
    q_Cv: Tensor,
    base_C: Tensor,
    slope_C: Tensor,
    inner_C: Tensor,
    grad_probs_mv: Tensor,
    tokens: SubchunkTokens,
) -> None:
    """Replace e by base * e + slope * q * (grad_probs - inner) in rows of sequences that require a gradient.

    This is the backward pass of the softmax (product with its Jacobian) for cross entropy and alignment together: the
    first term is the gradient of the cross entropy (without the target), the second is that of the alignment loss.

    Args:
        e_Cv: [C, v] multiples of the probabilities, overwritten.
        q_Cv: [C, v] multiples of the probabilities at the soft tokens' temperature, overwritten with scratch data;
            `e_Cv` itself if the temperature is 1.
        base_C: [C] factor of the cross-entropy term: the cross-entropy weight of the row.
        slope_C: [C] factor of the alignment term: the pooling weight of the row times the alignment factor, divided by
            the temperature and rescaled from `q` to `e`.
        inner_C: [C] inner product of the probabilities and grad_probs.
        grad_probs_mv: [m, v] gradient with respect to the pooled probabilities of each sequence.
        tokens: target tokens of the rows, which give the sequence of each row.
    """
    if _use_triton(e_Cv):
        triton_kernels.softmax_backward_(e_Cv, q_Cv, base_C, slope_C, inner_C, grad_probs_mv, tokens.grad_index)
        return
    offset_C = -slope_C * inner_C + (base_C if q_Cv is e_Cv else 0)
    for rows, _, index in tokens.spans if e_Cv.numel() else ():
        if index < 0:
            continue
        line_v = grad_probs_mv[index].to(base_C.dtype)
        for tile in row_tiles(e_Cv, rows.start, rows.stop):
            q_Cv[tile].mul_((slope_C[tile, None] * line_v).add_(offset_C[tile, None]))
            if q_Cv is not e_Cv:
                e_Cv[tile].mul_(base_C[tile, None]).add_(q_Cv[tile])


def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Add alpha * a @ b to `total`, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(total, a, b, alpha=alpha, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b, alpha=alpha)

"""Triton versions of the functions in `kernels`. Each makes one pass over the logits and accumulates in fp32.

The rows of all matrices have unit column stride and any row stride. A stride that is a multiple of 16 bytes allows
vectorized loads.

No kernel uses atomics, so results are deterministic. The shape letters are those of `kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = 4096  # number of columns that a program processes at a time
POOL_ROWS, POOL_LINE = 8, 512


@triton.jit
def _pool(
    p_ptr, weight_ptr, edge_ptr, pooled_ptr, columns, stride, pooled_stride, ROWS: tl.constexpr, LINE: tl.constexpr
):  # fmt: skip
    """Sum weight * p over the rows of one sequence, for LINE columns."""
    # Sequences are on axis 0, because the other axes of a grid are limited to 65,535 programs.
    sequence = tl.program_id(0)
    column = tl.program_id(1) * LINE + tl.arange(0, LINE)
    inside = column < columns
    stop = tl.load(edge_ptr + sequence + 1)
    total = tl.zeros((ROWS, LINE), tl.float32)
    for start in range(tl.load(edge_ptr + sequence), stop, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(weight_ptr + row, mask=row < stop, other=0.0)
        mask = (row < stop)[:, None] & inside[None, :]
        p = tl.load(p_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
        total += weight[:, None] * p.to(tl.float32)
    tl.store(pooled_ptr + sequence.to(tl.int64) * pooled_stride + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _inner_products(
    p_ptr, grad_probs_ptr, grad_index_ptr, inner_ptr, columns, stride, grad_stride, LINE: tl.constexpr
):  # fmt: skip
    """Compute <p, grad_probs> of one row."""
    row = tl.program_id(0)
    index = tl.load(grad_index_ptr + row)
    total = tl.zeros((LINE,), tl.float32)
    if index >= 0:
        p_ptr += row.to(tl.int64) * stride
        grad_probs_ptr += index.to(tl.int64) * grad_stride
        for start in range(0, columns, LINE):
            column = start + tl.arange(0, LINE)
            p = tl.load(p_ptr + column, mask=column < columns, other=0.0)
            grad = tl.load(grad_probs_ptr + column, mask=column < columns, other=0.0)
            total += p.to(tl.float32) * grad.to(tl.float32)
    tl.store(inner_ptr + row, tl.sum(total, 0))


@triton.jit
def _softmax_backward(
    e_ptr, q_ptr, base_ptr, slope_ptr, inner_ptr, grad_probs_ptr, grad_index_ptr, columns, stride, q_stride,
    grad_stride, SAME: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Replace e by base * e + slope * q * (grad_probs - inner) in one row."""
    row = tl.program_id(0)
    index = tl.load(grad_index_ptr + row)
    if index >= 0:
        base, slope, inner = tl.load(base_ptr + row), tl.load(slope_ptr + row), tl.load(inner_ptr + row)
        e_ptr += row.to(tl.int64) * stride
        q_ptr += row.to(tl.int64) * q_stride
        grad_probs_ptr += index.to(tl.int64) * grad_stride
        for start in range(0, columns, LINE):
            column = start + tl.arange(0, LINE)
            inside = column < columns
            e = tl.load(e_ptr + column, mask=inside, other=0.0).to(tl.float32)
            q = e if SAME else tl.load(q_ptr + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_probs_ptr + column, mask=inside, other=0.0).to(tl.float32)
            e = e * base + q * (slope * (grad - inner))
            tl.store(e_ptr + column, e.to(e_ptr.dtype.element_ty), mask=inside)


def pool(p_Cv: Tensor, weight_C: Tensor, sequence_C: Tensor, sequences: int) -> Tensor:
    """Implement `kernels.pool` on a GPU. `sequence_C` [C] must be sorted; `sequences` is their number n."""
    columns = p_Cv.shape[1]
    pooled = torch.empty(sequences, columns, dtype=torch.float32, device=p_Cv.device)
    # Rows are ordered by sequence.
    edges = torch.searchsorted(sequence_C, torch.arange(sequences + 1, device=p_Cv.device))
    grid = (sequences, triton.cdiv(columns, POOL_LINE))
    strides = p_Cv.stride(0), pooled.stride(0)
    _pool[grid](p_Cv, weight_C, edges, pooled, columns, *strides, ROWS=POOL_ROWS, LINE=POOL_LINE, num_warps=4)
    return pooled


def inner_products(p_Cv: Tensor, grad_probs_mv: Tensor, grad_index_C: Tensor) -> Tensor:
    """Implement `kernels.inner_products` on a GPU. `grad_index_C` [C] is -1 in rows without a gradient."""
    inner = torch.empty(len(p_Cv), dtype=torch.float32, device=p_Cv.device)
    strides = p_Cv.stride(0), grad_probs_mv.stride(0)
    _inner_products[(len(p_Cv),)](
        p_Cv, grad_probs_mv, grad_index_C, inner, p_Cv.shape[1], *strides, LINE=LINE, num_warps=8
    )
    return inner


def softmax_backward_(
    e_Cv: Tensor,
    q_Cv: Tensor,
    base_C: Tensor,
    slope_C: Tensor,
    inner_C: Tensor,
    grad_probs_mv: Tensor,
    grad_index_C: Tensor,
) -> None:
    """Implement `kernels.softmax_backward_` on a GPU. `grad_index_C` [C] is -1 in rows without a gradient."""
    _softmax_backward[(len(e_Cv),)](
        e_Cv,
        q_Cv,
        base_C,
        slope_C,
        inner_C,
        grad_probs_mv,
        grad_index_C,
        e_Cv.shape[1],
        e_Cv.stride(0),
        q_Cv.stride(0),
        grad_probs_mv.stride(0),
        SAME=q_Cv is e_Cv,
        LINE=LINE,
        num_warps=8,
    )

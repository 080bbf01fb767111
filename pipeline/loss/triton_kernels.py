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
def _softmax(
    z_ptr, log_sum_ptr, total_ptr, columns, stride, inverse_temperature, SLACK: tl.constexpr, LINE: tl.constexpr
):  # fmt: skip
    """Replace one row of logits by exponentials exp(z - reference), with one read and one write.

    The reference follows the largest logit seen so far, but may be up to SLACK below it, which is within the range of
    the dtype. If a logit exceeds this bound, the reference is raised and the part already written is rescaled.
    """
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride
    lane = tl.arange(0, LINE)
    reference = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, LINE):
        inside = start + lane < columns
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        largest = tl.max(z, 0)
        if largest > reference + SLACK:
            shrink = tl.exp(reference - largest)
            for done in range(0, start, LINE):
                e = tl.load(z_ptr + done + lane).to(tl.float32) * shrink
                tl.store(z_ptr + done + lane, e.to(z_ptr.dtype.element_ty))
            total *= shrink
            reference = largest
        e = tl.exp(z - reference)
        total += tl.sum(e, 0)
        tl.store(z_ptr + start + lane, e.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(log_sum_ptr + row, reference + tl.log(total))
    tl.store(total_ptr + row, total)


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
def _block_maxima(z_ptr, maxima_ptr, columns, stride, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the maxima of BLOCKS of the `blocks` blocks of one row. A block has BLOCK columns, the last one fewer."""
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = tl.load(z_ptr + row.to(tl.int64) * stride + column, mask=column < columns, other=float("-inf"))
    maxima = tl.max(z.to(tl.float32), 1)
    tl.store(
        maxima_ptr + row.to(tl.int64) * blocks + block, maxima.to(maxima_ptr.dtype.element_ty), mask=block < blocks
    )


@triton.jit
def _largest_logits(
    z_ptr, maxima_ptr, values_ptr, ids_ptr, columns, stride, blocks,
    k: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select the k largest logits of one row, largest first, from its k blocks with the largest maxima.

    Each iteration takes the largest remaining value, at the lowest id if several are equal. BLOCKS and K are `blocks`
    and k, rounded up to powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    slot = tl.arange(0, K)

    block = tl.arange(0, BLOCKS)
    maxima = tl.load(maxima_ptr + row * blocks + block, mask=block < blocks, other=float("-inf")).to(tl.float32)
    chosen = tl.zeros((K,), tl.int32)
    for i in range(k):
        largest = tl.max(maxima, 0)
        index = tl.min(tl.where(maxima == largest, block, blocks - 1), 0)
        chosen = tl.where(slot == i, index, chosen)
        maxima = tl.where(block == index, float("-inf"), maxima)

    grid = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (slot < k)[:, None] & (grid < columns)
    candidates = tl.load(z_ptr + grid, mask=inside, other=float("-inf")).to(tl.float32)
    # Candidates outside the row or the chosen blocks must not share an id with another one.
    column, z = tl.reshape(tl.where(inside, grid, columns), (K * BLOCK,)), tl.reshape(candidates, (K * BLOCK,))
    values, ids = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.int32)
    for i in range(k):
        largest = tl.max(z, 0)
        index = tl.min(tl.where(z == largest, column, columns - 1), 0)
        values, ids = tl.where(slot == i, largest, values), tl.where(slot == i, index, ids)
        z = tl.where(column == index, float("-inf"), z)
    tl.store(values_ptr + row * k + slot, values.to(values_ptr.dtype.element_ty), mask=slot < k)
    tl.store(ids_ptr + row * k + slot, ids.to(tl.int64), mask=slot < k)


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


def softmax_(z_Cv: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Implement `kernels.softmax_` on a GPU."""
    log_sum, total = (torch.empty(len(z_Cv), dtype=torch.float32, device=z_Cv.device) for _ in range(2))
    slack = 0 if z_Cv.dtype == torch.float16 else 40  # the gradient of fp16 has no range to spare
    _softmax[(len(z_Cv),)](
        z_Cv, log_sum, total, z_Cv.shape[1], z_Cv.stride(0), 1 / temperature, SLACK=slack, LINE=LINE, num_warps=8
    )
    return log_sum, total


def largest_logits(z_Cv: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Implement `kernels.largest_logits` on a GPU, for k blocks or more."""
    rows, columns = z_Cv.shape
    blocks, per_program = triton.cdiv(columns, block), LINE // block
    maxima = z_Cv.new_empty(rows, blocks)
    grid = (rows, triton.cdiv(blocks, per_program))
    _block_maxima[grid](z_Cv, maxima, columns, z_Cv.stride(0), blocks, BLOCKS=per_program, BLOCK=block, num_warps=8)
    values, ids = z_Cv.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64, device=z_Cv.device)
    powers = {"BLOCKS": triton.next_power_of_2(blocks), "K": triton.next_power_of_2(k)}
    _largest_logits[(rows,)](
        z_Cv, maxima, values, ids, columns, z_Cv.stride(0), blocks, k=k, **powers, BLOCK=block, num_warps=8
    )
    return values, ids


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

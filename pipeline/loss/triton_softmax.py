"""The softmax of the logits in one pass on a GPU, and the selection of the k largest logits of each row.

Without the selection there is one kernel, with one read and one write of the logits. With it, the same kernel leaves
some logits for a second one, which reads only these. No kernel uses atomics, so results are deterministic. The shape
letters are those of `kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE, SOFTMAX_WARPS = 2048, 4  # number of columns that `_softmax` processes at a time; it needs many registers
MIN_GROUPS = 32  # groups of blocks, whose maxima bound the k-th largest block maximum
AT_ONCE, SELECT_WARPS = 128, 1  # number of blocks from which `_largest_logits` selects at a time


@triton.jit
def _rescale(z_ptr, maxima_ptr, bound_ptr, shrink, stop, LINE: tl.constexpr, BLOCK: tl.constexpr, k: tl.constexpr):
    """Multiply the first `stop` exponentials of a row by `shrink`, except in blocks that keep their logits."""
    block = tl.arange(0, LINE // BLOCK)
    lane = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if k:
        tl.debug_barrier()  # threads read maxima that others have written
    for start in range(0, stop, LINE):
        replaced = lane >= 0
        if k:
            maxima = tl.load(maxima_ptr + start // BLOCK + block).to(tl.float32)
            replaced &= (maxima < tl.load(bound_ptr + start // LINE))[:, None]
        e = tl.load(z_ptr + start + lane, mask=replaced, other=0.0).to(tl.float32) * shrink
        tl.store(z_ptr + start + lane, e.to(z_ptr.dtype.element_ty), mask=replaced)


@triton.jit
def _kth_largest(values, k: tl.constexpr):
    """Return the k-th largest of at most 64 values, by comparing all pairs."""
    as_large = tl.sum((values[:, None] >= values[None, :]).to(tl.int32), 0)
    return tl.max(tl.where(as_large >= k, values, float("-inf")), 0)


@triton.jit
def _softmax(
    z_ptr, log_sum_ptr, total_ptr, reference_ptr, maxima_ptr, bound_ptr, left_ptr, count_ptr, columns, stride, blocks,
    inverse_temperature, SLACK: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr, k: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Replace one row of logits by exponentials exp(z - reference), with one read and one write.

    The reference follows the largest logit seen so far, but may be up to SLACK below it, which is within the range of
    the dtype. If a logit exceeds this bound, the reference is raised and the part already written is rescaled.

    If k is not 0, a block of BLOCK columns keeps its logits if its maximum may be among the k largest block maxima.
    These blocks are listed in `left`, ascending. `_largest_logits` selects from them, and then replaces them too.
    `best` has the largest block maximum so far of each of GROUPS groups of blocks. The k-th largest of these, `bound`,
    is at most the k-th largest block maximum. The bound of each line tells which of its blocks to rescale later.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    block = tl.arange(0, LINE // BLOCK)
    lane = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    reference, bound = tl.full((), float("-inf"), tl.float32), tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    best = tl.full((GROUPS,), float("-inf"), tl.float32)
    count = tl.full((), 0, tl.int32)
    if k:
        maxima_ptr += row * blocks
        left_ptr += row * blocks
        bound_ptr += row * tl.cdiv(columns, LINE)
    for start in range(0, columns, LINE):
        inside = start + lane < columns
        z = tl.load(z_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        maxima = tl.max(z, 1)
        largest = tl.max(maxima, 0)
        if largest > reference + SLACK:
            shrink = tl.exp(reference - largest)
            _rescale(z_ptr, maxima_ptr, bound_ptr, shrink, start, LINE, BLOCK, k)
            total *= shrink
            reference = largest
        replaced = inside
        if k:
            best = tl.maximum(best, tl.max(tl.reshape(maxima, (GROUPS, LINE // BLOCK // GROUPS)), 1))
            line = start // LINE
            if (line & (line - 1)) == 0:  # 0 or a power of two; later, the bound rises slowly
                bound = _kth_largest(best, k)
            number = start // BLOCK + block
            keep = (maxima >= bound) & (number < blocks)
            tl.store(maxima_ptr + number, maxima.to(maxima_ptr.dtype.element_ty), mask=number < blocks)
            tl.store(bound_ptr + line, bound)
            slot = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(left_ptr + slot, number.to(left_ptr.dtype.element_ty), mask=keep)
            count += tl.sum(keep.to(tl.int32), 0)
            replaced &= (maxima < bound)[:, None]
        e = tl.exp(z - reference)
        total += tl.sum(tl.sum(e, 1), 0)
        tl.store(z_ptr + start + lane, e.to(z_ptr.dtype.element_ty), mask=replaced)
    tl.store(log_sum_ptr + row, reference + tl.log(total))
    tl.store(total_ptr + row, total)
    if k:
        tl.store(count_ptr + row, count)
        tl.store(reference_ptr + row, reference)


@triton.jit
def _largest_logits(
    z_ptr, maxima_ptr, left_ptr, count_ptr, reference_ptr, values_ptr, ids_ptr, columns, stride, blocks,
    k: tl.constexpr, AT_ONCE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Select the k largest logits of one row from the blocks that `_softmax` has left, and replace these.

    The largest is first; among equal logits, the one with the lowest id. They are in the k blocks with the largest
    maxima. K is k rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    maxima_ptr += row * blocks
    left_ptr += row * blocks
    count = tl.load(count_ptr + row)
    slot = tl.arange(0, K)
    lane = tl.arange(0, BLOCK)[None, :]

    # The best k blocks so far. An equal maximum does not replace an earlier one.
    best = tl.where(slot < k, float("-inf"), float("inf"))
    chosen = tl.full((K,), blocks, tl.int32)
    for start in range(0, count, AT_ONCE):
        place = start + tl.arange(0, AT_ONCE)
        block = tl.load(left_ptr + place, mask=place < count, other=blocks).to(tl.int32)
        maxima = tl.load(maxima_ptr + block, mask=place < count, other=float("-inf")).to(tl.float32)
        smallest = tl.min(best, 0)
        largest = tl.max(maxima, 0)
        while largest > smallest:
            index = tl.min(tl.where(maxima == largest, block, blocks), 0)
            last = tl.max(tl.where(best == smallest, chosen, -1), 0)
            free = tl.min(tl.where((best == smallest) & (chosen == last), slot, K), 0)
            best = tl.where(slot == free, largest, best)
            chosen = tl.where(slot == free, index, chosen)
            maxima = tl.where(block == index, float("-inf"), maxima)
            smallest = tl.min(best, 0)
            largest = tl.max(maxima, 0)

    grid = chosen[:, None] * BLOCK + lane
    # Slots without a block have the number `blocks`, so their columns are outside the row.
    candidates = tl.load(z_ptr + grid, mask=grid < columns, other=float("-inf"))
    column = tl.reshape(grid, (K * BLOCK,))
    z = tl.reshape(candidates.to(tl.float32), (K * BLOCK,))
    values, ids = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.int32)
    for i in range(k):
        largest = tl.max(z, 0)
        index = tl.min(tl.where(z == largest, column, columns), 0)
        values, ids = tl.where(slot == i, largest, values), tl.where(slot == i, index, ids)
        z = tl.where(column == index, float("-inf"), z)
    tl.store(values_ptr + row * k + slot, values.to(values_ptr.dtype.element_ty), mask=slot < k)
    # If no logit is above -inf, as in a row of NaN, no block is chosen. Its ids are used as indices all the same.
    ids = tl.minimum(ids, columns - 1)
    tl.store(ids_ptr + row * k + slot, ids.to(tl.int64), mask=slot < k)

    tl.debug_barrier()  # below, threads overwrite logits that others have read
    reference = tl.load(reference_ptr + row)
    for start in range(0, count, K):
        block = tl.load(left_ptr + start + slot, mask=start + slot < count, other=blocks).to(tl.int32)
        grid = block[:, None] * BLOCK + lane
        inside = grid < columns
        e = tl.exp(tl.load(z_ptr + grid, mask=inside, other=0.0).to(tl.float32) - reference)
        tl.store(z_ptr + grid, e.to(z_ptr.dtype.element_ty), mask=inside)


def softmax_(z_Cv: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Implement `kernels.softmax_` on a GPU."""
    return _run_softmax(z_Cv, temperature, 0, 32, [z_Cv] * 5)  # without k, these buffers are not used


def softmax_with_largest_(z_Cv: Tensor, k: int, block: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Implement `kernels.softmax_with_largest_` on a GPU, for k blocks or more."""
    rows, columns = z_Cv.shape
    blocks, device = triton.cdiv(columns, block), z_Cv.device
    maxima, values = z_Cv.new_empty(rows, blocks), z_Cv.new_empty(rows, k)
    left = torch.empty(rows, blocks, dtype=torch.int16 if blocks < 1 << 15 else torch.int32, device=device)
    bound = torch.empty(rows, triton.cdiv(columns, LINE), dtype=torch.float32, device=device)
    reference, count = (torch.empty(rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
    sums = _run_softmax(z_Cv, 1.0, k, block, [reference, maxima, bound, left, count])
    ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    _largest_logits[(rows,)](
        z_Cv, maxima, left, count, reference, values, ids, columns, z_Cv.stride(0), blocks,
        k=k, AT_ONCE=AT_ONCE, K=triton.next_power_of_2(k), BLOCK=block, num_warps=SELECT_WARPS,
    )  # fmt: skip
    return sums, values, ids


def _run_softmax(z_Cv: Tensor, temperature: float, k: int, block: int, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    (rows, columns), groups = z_Cv.shape, max(MIN_GROUPS, triton.next_power_of_2(k))
    log_sum, total = (torch.empty(rows, dtype=torch.float32, device=z_Cv.device) for _ in range(2))
    # The gradient of fp16 has no range to spare. The relative error of a GPU's exp(x) grows with |x|, which fp32 shows.
    slack = {torch.float16: 0, torch.float32: 8}.get(z_Cv.dtype, 40)
    _softmax[(rows,)](
        z_Cv, log_sum, total, *buffers, columns, z_Cv.stride(0), triton.cdiv(columns, block), 1 / temperature,
        SLACK=slack, LINE=LINE, BLOCK=block, k=k, GROUPS=groups, num_warps=SOFTMAX_WARPS,
    )  # fmt: skip
    return log_sum, total

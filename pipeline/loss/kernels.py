"""Passes over one chunk of logits, in place.

On a GPU they are the kernels of `triton_kernels`, which sum in fp32; float64 there takes the way of the CPU.
Shape letters: C rows (positions) of the chunk, v vocabulary rows of this rank, n sequences of the block, m moved ones
(whose summaries have a gradient), d hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.loss.chunking import Run

if find_spec("triton"):
    from pipeline.loss import triton_kernels

CACHE_BYTES = 1 << 20  # a tile of rows that a CPU core's second-level cache holds
PARTS = 8  # a CPU shares a product of few rows among its threads only where it comes as a batch of products


@dataclass(frozen=True)
class Rows:
    """The positions of a chunk.

    Attributes:
        targets, pooling, ce, sequence: [C] target id, pooling weight, cross-entropy weight, sequence in the block.
        moved: [C] the sequence's index among the moved ones, or -1.
        runs: the same on the host: rows of each sequence. moved_of: [n] on the host, index among the moved or -1.
    """

    targets: Tensor
    pooling: Tensor
    ce: Tensor
    sequence: Tensor
    moved: Tensor
    runs: tuple[Run, ...]
    moved_of: list[int]


def _tiles(z: Tensor, start: int, stop: int) -> Iterator[slice]:
    rows = max(1, CACHE_BYTES // max(1, z.shape[1] * z.element_size()))
    return (slice(first, min(first + rows, stop)) for first in range(start, stop, rows))


def _has_kernels(z: Tensor) -> bool:
    return z.is_cuda and z.dtype != torch.float64 and z.numel() > 0


def softmax_(z_Cv: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z <- some multiple of softmax(z / temperature) over these columns, chosen for precision.

    Returns [C] the logarithm of the sum of exp(z / temperature), and [C] what each row of z sums to now.
    """
    dtype = torch.promote_types(z_Cv.dtype, torch.float32)
    log_sum, total = (z_Cv.new_empty(len(z_Cv), dtype=dtype) for _ in range(2))
    if z_Cv.shape[1] == 0:
        return log_sum.fill_(-torch.inf), total.fill_(1)
    if _has_kernels(z_Cv):
        return triton_kernels.softmax_(z_Cv, temperature)
    if z_Cv.dtype == dtype:
        if temperature != 1:
            z_Cv.div_(temperature)
        largest = z_Cv.amax(1)
        torch.softmax(z_Cv, 1, out=z_Cv)
        # The largest entry of a softmax is one over the sum of exponentials relative to it.
        return largest - z_Cv.amax(1).log(), total.fill_(1)
    for tile in _tiles(z_Cv, 0, len(z_Cv)):
        # Half precisions keep exp(z - max), whose range they can hold.
        wide = z_Cv[tile].to(dtype) / temperature
        largest = wide.amax(1)
        total[tile] = wide.sub_(largest[:, None]).exp_().sum(1)
        log_sum[tile] = largest + total[tile].log()
        z_Cv[tile] = wide
    return log_sum, total


def cap_(z_Cv: Tensor, softcap: float, slope_Cv: Tensor) -> Tensor:
    """z <- softcap * tanh(z / softcap); fills and returns the derivative, 1 - tanh^2."""
    z_Cv.div_(softcap).tanh_()
    torch.mul(z_Cv, z_Cv, out=slope_Cv).neg_().add_(1)
    z_Cv.mul_(softcap)
    return slope_Cv


def pool(p_Cv: Tensor, weight_C: Tensor, rows: Rows) -> Tensor:
    """[n, v] sum of weight * p over the rows of each sequence."""
    if _has_kernels(p_Cv):
        return triton_kernels.pool(p_Cv, weight_C, rows.sequence, len(rows.moved_of))
    pooled = weight_C.new_zeros(len(rows.moved_of), p_Cv.shape[1])
    weight_C = weight_C.to(p_Cv.dtype)
    parts = PARTS if p_Cv.shape[1] % PARTS == 0 else 1
    for run in rows.runs:
        columns = p_Cv[run.start : run.stop].unflatten(1, (parts, -1)).transpose(0, 1)
        weights = weight_C[run.start : run.stop].expand(parts, 1, -1)
        pooled[run.sequence] = torch.bmm(weights, columns).flatten()
    return pooled


def times_embedding(pooled_nv: Tensor, embedding_vd: Tensor) -> Tensor:
    """[n, d] pooled @ embedding, for few rows."""
    n, v = pooled_nv.shape
    if pooled_nv.is_cuda or v % PARTS:
        return pooled_nv @ embedding_vd
    by_part = torch.bmm(pooled_nv.view(n, PARTS, -1).transpose(0, 1), embedding_vd.unflatten(0, (PARTS, -1)))
    return by_part.sum(0)


def inner_products(p_Cv: Tensor, direction_mv: Tensor, rows: Rows) -> Tensor:
    """[C] <p, direction> of the rows of moved sequences; 0 elsewhere."""
    if _has_kernels(p_Cv):
        return triton_kernels.inner_products(p_Cv, direction_mv, rows.moved)
    inner = torch.zeros_like(rows.pooling)
    for run, m in _moved_runs(rows):
        inner[run.start : run.stop] = p_Cv[run.start : run.stop] @ direction_mv[m]
    return inner


def tilt_(
    e_Cv: Tensor, q_Cv: Tensor, base_C: Tensor, slope_C: Tensor, inner_C: Tensor, direction_mv: Tensor, rows: Rows
) -> None:
    """e <- base * e + slope * q * (direction - inner) in the rows of moved sequences; q is consumed.

    The softmax Jacobian of both terms. q is e itself where the temperature is 1.
    """
    if _has_kernels(e_Cv):
        triton_kernels.tilt_(e_Cv, q_Cv, base_C, slope_C, inner_C, direction_mv, rows.moved)
        return
    offset_C = -slope_C * inner_C + (base_C if q_Cv is e_Cv else 0)
    for run, m in _moved_runs(rows):
        line_v = direction_mv[m].to(base_C.dtype)
        for tile in _tiles(e_Cv, run.start, run.stop):
            q_Cv[tile].mul_((slope_C[tile, None] * line_v).add_(offset_C[tile, None]))
            if q_Cv is not e_Cv:
                e_Cv[tile].mul_(base_C[tile, None]).add_(q_Cv[tile])


def _moved_runs(rows: Rows) -> Iterator[tuple[Run, int]]:
    return ((run, rows.moved_of[run.sequence]) for run in rows.runs if rows.moved_of[run.sequence] >= 0)

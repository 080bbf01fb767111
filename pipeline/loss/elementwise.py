"""Passes over one chunk of logits, done in place, a few rows at a time so that they stay in the processor's cache.

Shape letters: C rows (positions) of the chunk, v vocabulary rows of this rank, n sequences of the chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_BYTES = 1 << 20  # a tile of rows that a CPU core's second-level cache holds


def _tiles(z: Tensor) -> Iterator[slice]:
    rows = len(z)
    if z.device.type == "cpu":
        rows = max(1, CACHE_BYTES // max(1, z.shape[1] * z.element_size()))
    return (slice(start, start + rows) for start in range(0, len(z), rows))


def row_max(z_Cv: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] largest logit of each row; -inf where this rank has no vocabulary rows."""
    if z_Cv.shape[1] == 0:
        return z_Cv.new_full((len(z_Cv),), -torch.inf, dtype=dtype)
    return z_Cv.amax(dim=1).to(dtype)


def exponentials_(z_Cv: Tensor, max_C: Tensor, temperature: float) -> Tensor:
    """z <- exp((z - max) / temperature); returns the [C] row sums, taken before rounding to z's dtype."""
    sums = torch.zeros_like(max_C)
    for tile in _tiles(z_Cv):
        z = z_Cv[tile]
        e = z.sub_(max_C[tile, None]) if z.dtype == max_C.dtype else z.to(max_C.dtype) - max_C[tile, None]
        if temperature != 1:
            e.div_(temperature)
        sums[tile] = e.exp_().sum(dim=1)
        if e is not z:
            z.copy_(e)
    return sums


def cap_(z_Cv: Tensor, softcap: float, slope_Cv: Tensor) -> Tensor:
    """z <- softcap * tanh(z / softcap); fills and returns the derivative, 1 - tanh^2."""
    z_Cv.div_(softcap).tanh_()
    torch.mul(z_Cv, z_Cv, out=slope_Cv).neg_().add_(1)
    z_Cv.mul_(softcap)
    return slope_Cv


def tilt_(e_Cv: Tensor, base_C: Tensor, slope_C: Tensor, direction_nv: Tensor, row_of: Tensor) -> None:
    """e <- e * (base + slope * direction[row_of]): the softmax Jacobian of the alignment term, unnormalised."""
    for tile in _tiles(e_Cv):
        factor = direction_nv[row_of[tile]]
        factor.mul_(slope_C[tile, None]).add_(base_C[tile, None])
        e_Cv[tile].mul_(factor)

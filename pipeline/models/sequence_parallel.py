"""Sequence parallelism: P consecutive ranks share packed rows (Ulysses, arXiv 2309.14509).

Outside attention, each of these ranks holds every P-th token of the rows. Inside attention, it holds all tokens, in
order, but only 1/P of the heads. So `packed_attention` works as for a single rank, and only four all-to-alls are
needed per layer: one before and one after attention, in forward and in backward.

The tokens are dealt out one by one, as in striped attention (arXiv 2311.09431), not cut into P blocks. Each sequence
then has the same number of target tokens on all P ranks, give or take a few, so the loss can process the same sequences
on all of them at the same time.

DeepSpeed's `UlyssesSPAttentionHF` is not used. It requires P blocks of consecutive tokens, so a chunk of the loss would
be on one rank. It does not pass on the sequence boundaries: flash attention derives them from the position ids, which
are gathered in each layer. And it takes three all-to-alls before attention where one suffices.

Shape letters: P ranks, n tokens of each rank, T = P * n tokens, H heads of a tensor, D head size.
"""

import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.settings import TrainingSettings


class HeadExchange:
    """All-to-all between tokens and heads of the ranks that share rows.

    Args:
        size: P.
        group: process group of these ranks, or None if this process holds the tokens of all P ranks, one rank after the
            other. Then only the order of the tokens changes. This checks a model in one process.
    """

    def __init__(self, size: int, group: dist.ProcessGroup | None) -> None:
        self.size, self.group, self.splits_heads = size, group, group is not None

    @classmethod
    def of_ranks(cls, settings: TrainingSettings) -> "HeadExchange | None":
        """Create the process groups of P consecutive ranks. Collective: all ranks must call it.

        Returns:
            The exchange of this rank's group, or None if P is 1.
        """
        size = settings.sequence_parallel_size
        if size == 1:
            return None
        # As for the default group, the watchdog reports a hang first.
        group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=settings.hang_timeout_s + 60))
        return cls(size, group)

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Exchange all heads of this rank's tokens for this rank's heads of all tokens.

        If P does not divide H, each head is repeated P / gcd(H, P) times, as for fewer than P key-value heads.

        Args:
            tensors: [n, H, D] each, with their own H and D.

        Returns:
            [T, H' / P, D] each, where H' is H after repetition; [T, H, D] without a process group.
        """
        if not self.splits_heads:
            return [x.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(0, 1) for x in tensors]
        parts, shapes = [], []
        for x in tensors:
            repeats = self.size // math.gcd(x.shape[1], self.size)
            x = x.repeat_interleave(repeats, dim=1) if repeats > 1 else x
            x = x.unflatten(1, (self.size, -1))
            parts.append(x.transpose(0, 1).flatten(2))
            shapes.append(x.shape[2:])
        received = self._all_to_all(torch.cat(parts, dim=2)).transpose(0, 1).flatten(0, 1)
        columns = received.split([shape.numel() for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(columns, shapes, strict=True)]

    def to_tokens(self, x: Tensor) -> Tensor:
        """Reverse `to_heads` for one [T, H / P, D] tensor, such as the output of attention."""
        by_rank = x.unflatten(0, (-1, self.size)).transpose(0, 1)
        if not self.splits_heads:
            return by_rank.flatten(0, 1)
        return self._all_to_all(by_rank.contiguous()).transpose(0, 1).flatten(1, 2)

    def _all_to_all(self, x: Tensor) -> Tensor:
        """Send x[r] to rank r of the group, and receive as many elements from each."""
        return _AllToAll.apply(x, self.group)


class _AllToAll(torch.autograd.Function):
    """All-to-all of equal parts. Its backward sends the gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad_outputs[0].contiguous(), ctx.group), None

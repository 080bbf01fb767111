"""Gather the layout of the target tokens of all ranks.

Shape letters: T target tokens of this rank, A of all ranks, S sequences of all ranks.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.loss.chunking import Block
from pipeline.loss.comm import Group, _all_gather_uneven, all_gather, world_of
from pipeline.loss.loss_batch import LossBatch


@dataclass(frozen=True)
class Layout:
    """The supervised positions of all ranks, the same on each, on the host.

    Numbered rank after rank when gathered, in the order of the blocks once `ordered`.

    Attributes:
        lengths, pivots: for each rank and sequence, its supervised positions and its pivot in that rank's list.
        targets, pooling, ce, sequence: [A] target id, pooling weight, cross-entropy weight and sequence of each.
        pivot, problem, language, length: [S].
    """

    lengths: list[list[int]]
    pivots: list[list[int]]
    targets: Tensor
    pooling: Tensor
    ce: Tensor
    sequence: Tensor
    pivot: Tensor
    problem: Tensor
    language: Tensor
    length: Tensor

    def ordered(self, blocks: list[Block], order: list[tuple[int, int]]) -> "Layout":
        """The same in the order that `schedule` returned."""
        first_position = list(accumulate(map(sum, self.lengths), initial=0))
        first_sequence = list(accumulate(map(len, self.lengths), initial=0))
        ranges = [torch.arange(0)]
        for piece in (piece for block in blocks for piece in block.pieces):
            ranges += [torch.arange(s + a, s + b) for s, (a, b) in zip(first_position, piece.ranges, strict=False)]
        positions = torch.cat(ranges)
        old = torch.tensor([first_sequence[rank] + i for rank, i in order], dtype=torch.int64)
        new = torch.empty_like(old)
        new[old] = torch.arange(len(old))
        return replace(
            self,
            targets=self.targets[positions],
            pooling=self.pooling[positions],
            ce=self.ce[positions],
            sequence=new[self.sequence[positions]],
            pivot=new[self.pivot[old]],
            problem=self.problem[old],
            language=self.language[old],
            length=self.length[old],
        )


def gather_layout(local: LossBatch, pooling: str, dtype: torch.dtype, device: torch.device, group: Group) -> Layout:
    """Three small all-gathers on the device: counts, integers, weights. The rest is done on the host.

    A GPU would spend longer on launching this than a CPU on doing it.
    """
    local = local.to("cpu")
    _, size = world_of(group)
    mine = torch.tensor([len(local.targets), len(local.lengths)])
    # A lone rank asks its device for nothing, so that it need not wait for it.
    counts = all_gather(mine.to(device) if size > 1 else mine, group).tolist()
    splits = [s for _, s in counts]
    starts = list(accumulate(splits, initial=0))[:-1]

    ce = torch.ones_like(local.lengths) if local.ce_weights is None else local.ce_weights
    facts = torch.stack([local.lengths, local.pivot, local.problem, local.language])
    integers_R = [torch.cat([local.targets, facts.flatten()])]
    weights_R = [torch.cat([local.pooling_weights(pooling, dtype), ce.to(dtype)[local.sequence_of_token()]])]
    if size > 1:
        integers_R = _all_gather_uneven(integers_R[0].to(device), [t + 4 * s for t, s in counts], group)
        weights_R = _all_gather_uneven(weights_R[0].to(device), [2 * t for t, _ in counts], group)

    facts_R = [row[t:].view(4, s) for row, (t, s) in zip(integers_R, counts, strict=True)]
    length, pivot, problem, language = torch.cat(facts_R, dim=1)
    pivot_R = pivot.split(splits)
    return Layout(
        lengths=[part.tolist() for part in length.split(splits)],
        pivots=[part.tolist() for part in pivot_R],
        targets=torch.cat([row[:t] for row, (t, _) in zip(integers_R, counts, strict=True)]),
        pooling=torch.cat([row[:t] for row, (t, _) in zip(weights_R, counts, strict=True)]),
        ce=torch.cat([row[t:] for row, (t, _) in zip(weights_R, counts, strict=True)]),
        sequence=torch.repeat_interleave(length),
        pivot=torch.cat([part + start for part, start in zip(pivot_R, starts, strict=True)]),
        problem=problem,
        language=language,
        length=length,
    )


def upload(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype from the host in a single copy, which does not wait for the device."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

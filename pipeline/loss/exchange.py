"""What the ranks tell each other: the layout of all supervised positions, hidden states out, gradients back.

Shape letters: T supervised positions of this rank, A of all ranks, S sequences of all ranks, C rows of a piece,
R ranks, d hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.schedule import Block, Piece
from pipeline.loss.supervised import Supervised

Group = dist.ProcessGroup | None

# torch 2.13 renamed both.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_of(group: Group) -> tuple[int, int]:
    """(rank, size) of the group; (0, 1) without one."""
    return (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)


def all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """In place; nothing to do for one rank or an empty tensor."""
    if world_of(group)[1] > 1 and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """[...] of each rank -> [R, ...]."""
    size = world_of(group)[1]
    if size == 1 or not tensor.numel():
        return tensor.expand(size, *tensor.shape)
    out = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
    all_gather_single(out, tensor.contiguous(), group=group)
    return out.view(size, *tensor.shape)


def all_to_all(tensor: Tensor, sent: list[int] | None, received: list[int] | None, group: Group) -> Tensor:
    """Rows of dimension 0, split over the ranks; None: one each."""
    if world_of(group)[1] == 1:
        return tensor
    rows = len(tensor) if received is None else sum(received)
    out = tensor.new_empty(rows, *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
    return out


def _all_gather_uneven(tensor: Tensor, sizes: list[int], group: Group) -> list[Tensor]:
    """[sizes[r]] of each rank on the host, by padding to the longest."""
    padded = tensor.new_zeros(max(sizes))
    padded[: len(tensor)] = tensor
    return [row[:size] for row, size in zip(all_gather(padded, group).cpu(), sizes, strict=True)]


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


def gather_layout(local: Supervised, pooling: str, dtype: torch.dtype, device: torch.device, group: Group) -> Layout:
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


class HiddenExchange:
    """Brings the hidden states of a piece to every rank, one piece ahead, and takes their gradients back.

    `hidden` [T, d] and `grad` [T, d] are this rank's own; a piece has [C, d] rows, rank after rank. Where the rows
    are not `shared`, each rank sees its own alone, and nothing is sent.
    """

    def __init__(self, hidden: Tensor, grad: Tensor | None, group: Group, shared: bool) -> None:
        self.hidden, self.grad, self.group = hidden, grad, group
        self.rank, self.size = world_of(group)
        self.shared = shared and self.size > 1
        self._reducing: tuple[dist.Work, Tensor, Tensor] | None = None

    def stream(self, pieces: list[Piece]) -> Iterator[Tensor]:
        """[C, d] of each piece in turn; while one is used, the next is in flight."""
        ahead = self._start(pieces[0]) if pieces else None
        for index, piece in enumerate(pieces):
            assert ahead is not None
            work, buffer = ahead
            ahead = self._start(pieces[index + 1]) if index + 1 < len(pieces) else None
            if work is not None:
                work.wait()
            yield self._compact(buffer, piece)

    def _start(self, piece: Piece) -> tuple[dist.Work | None, Tensor]:
        start, end = piece.ranges[self.rank]
        mine = self.hidden[start:end]
        if not self.shared:
            return None, mine
        if len(mine) < piece.longest:
            mine = torch.cat([mine, mine.new_zeros(piece.longest - len(mine), mine.shape[1])])
        buffer = mine.new_empty(self.size * piece.longest, mine.shape[1])
        return all_gather_single(buffer, mine.contiguous(), group=self.group, async_op=True), buffer

    def _compact(self, buffer: Tensor, piece: Piece) -> Tensor:
        if piece.even or not self.shared:
            return buffer
        rows = buffer.view(self.size, piece.longest, -1)
        return torch.cat([rows[r, : end - start] for r, (start, end) in enumerate(piece.ranges)])

    def reduce(self, piece: Piece, grad: Tensor) -> None:
        """Sum the ranks' [C, d] gradients of a piece, each rank keeping its own rows; done when the next one starts."""
        start, end = piece.ranges[self.rank]
        assert self.grad is not None
        if not self.shared:
            self.grad[start:end] = grad
            return
        self.finish()
        if not piece.even:
            padded = grad.new_zeros(self.size, piece.longest, grad.shape[1])
            counts = [end - start for start, end in piece.ranges]
            for r, rows in enumerate(grad.split(counts)):
                padded[r, : counts[r]] = rows
            grad = padded.view(-1, grad.shape[1])
        out = grad.new_empty(piece.longest, grad.shape[1])
        work = reduce_scatter_single(out, grad.contiguous(), group=self.group, async_op=True)
        self._reducing = (work, out, self.grad[start:end])

    def finish(self) -> None:
        """Wait for the gradient in flight, if any."""
        if self._reducing is not None:
            work, out, target = self._reducing
            work.wait()
            target.copy_(out[: len(target)])
            self._reducing = None

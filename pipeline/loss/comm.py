"""What the ranks tell each other: the layout of all supervised positions, hidden states out, gradients back.

Shape letters: T supervised positions of this rank, A of all ranks, S sequences of all ranks, C rows of a piece,
R ranks, d hidden size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.chunking import Piece

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

"""Collectives of the loss: small gathers and reductions, and the exchange of hidden states and their gradients.

Shape letters: T target tokens of this rank, C rows of a subchunk, R ranks, d hidden size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.chunking import Subchunk

Group = dist.ProcessGroup | None

# torch 2.13 renamed both functions.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank_and_size(group: Group) -> tuple[int, int]:
    """Return (rank, world size) in the group, or (0, 1) if the group is None."""
    return (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)


def all_reduce(tensor: Tensor, group: Group) -> Tensor:
    """Sum a tensor over the ranks in place and return it. Does nothing if it is empty or there is only one rank."""
    if rank_and_size(group)[1] > 1 and tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Gather tensors [...] of equal shape from all ranks into [R, ...]."""
    size = rank_and_size(group)[1]
    if size == 1 or not tensor.numel():
        return tensor.expand(size, *tensor.shape)
    out = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
    all_gather_single(out, tensor.contiguous(), group=group)
    return out.view(size, *tensor.shape)


def all_gather_uneven(tensor: Tensor, sizes: list[int], group: Group) -> list[Tensor]:
    """Gather 1-d tensors of different lengths, by padding them to the longest.

    Args:
        tensor: [sizes[rank]].
        sizes: length of each rank's tensor, equal on all ranks.
        group: process group, or None for a single process.

    Returns:
        For each rank r, its tensor [sizes[r]] on the host.
    """
    padded = tensor.new_zeros(max(sizes))
    padded[: len(tensor)] = tensor
    return [row[:size] for row, size in zip(all_gather(padded, group).cpu(), sizes, strict=True)]


def all_to_all(tensor: Tensor, sent: list[int] | None, received: list[int] | None, group: Group) -> Tensor:
    """Send consecutive slices of dimension 0 to the ranks, and receive theirs.

    Args:
        tensor: [sum(sent), ...].
        sent: length of the slice for each rank, or None for equal lengths.
        received: length of the slice from each rank, or None for equal lengths.
        group: process group, or None for a single process.

    Returns:
        [sum(received), ...], ordered by rank.
    """
    if rank_and_size(group)[1] == 1:
        return tensor
    rows = len(tensor) if received is None else sum(received)
    out = tensor.new_empty(rows, *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
    return out


class HiddenExchange:
    """Exchange that gathers the hidden states one subchunk ahead and reduce-scatters their gradients.

    A subchunk has [C, d] rows, ordered by rank.

    Args:
        hidden: [T, d] hidden states of this rank.
        grad: [T, d] receives their gradient, or None.
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.
        gather: whether each rank needs the rows of all ranks. If not, it uses its own rows without communication.
    """

    def __init__(self, hidden: Tensor, grad: Tensor | None, group: Group, gather: bool) -> None:
        self.hidden, self.grad, self.group = hidden, grad, group
        self.rank, self.size = rank_and_size(group)
        self.gather = gather and self.size > 1
        self._reducing: tuple[dist.Work, Tensor, Tensor] | None = None

    def stream(self, subchunks: list[Subchunk]) -> Iterator[Tensor]:
        """Yield the [C, d] rows of each subchunk in turn, while the gather of the next one is in flight."""
        ahead = self._start(subchunks[0]) if subchunks else None
        for index, subchunk in enumerate(subchunks):
            assert ahead is not None
            work, buffer = ahead
            ahead = self._start(subchunks[index + 1]) if index + 1 < len(subchunks) else None
            if work is not None:
                work.wait()
            yield self._remove_padding(buffer, subchunk)

    def _start(self, subchunk: Subchunk) -> tuple[dist.Work | None, Tensor]:
        """Start the all-gather of a subchunk. Return its work handle and its (padded) buffer."""
        start, end = subchunk.ranges[self.rank]
        local = self.hidden[start:end]
        if not self.gather:
            return None, local
        if len(local) < subchunk.max_count:
            local = torch.cat([local, local.new_zeros(subchunk.max_count - len(local), local.shape[1])])
        buffer = local.new_empty(self.size * subchunk.max_count, local.shape[1])
        return all_gather_single(buffer, local.contiguous(), group=self.group, async_op=True), buffer

    def _remove_padding(self, buffer: Tensor, subchunk: Subchunk) -> Tensor:
        if subchunk.is_even or not self.gather:
            return buffer
        rows = buffer.view(self.size, subchunk.max_count, -1)
        return torch.cat([rows[r, :count] for r, count in enumerate(subchunk.counts)])

    def reduce(self, subchunk: Subchunk, grad: Tensor) -> None:
        """Start the reduce-scatter of a subchunk's [C, d] gradients. Each rank receives the sum for its own rows.

        It is complete when the next reduction starts, or after `finish`.
        """
        start, end = subchunk.ranges[self.rank]
        assert self.grad is not None
        if not self.gather:
            self.grad[start:end] = grad
            return
        self.finish()
        if not subchunk.is_even:
            padded = grad.new_zeros(self.size, subchunk.max_count, grad.shape[1])
            for r, rows in enumerate(grad.split(subchunk.counts)):
                padded[r, : subchunk.counts[r]] = rows
            grad = padded.view(-1, grad.shape[1])
        out = grad.new_empty(subchunk.max_count, grad.shape[1])
        work = reduce_scatter_single(out, grad.contiguous(), group=self.group, async_op=True)
        self._reducing = (work, out, self.grad[start:end])

    def finish(self) -> None:
        """Wait for the reduction in flight, if any."""
        if self._reducing is not None:
            work, out, target = self._reducing
            work.wait()
            target.copy_(out[: len(target)])
            self._reducing = None

"""Collectives of the loss: small gathers and reductions, and the exchange of hidden states and their gradients.

Shape letters: T target tokens of this rank, C rows of a subchunk, R ranks, d hidden size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .chunking import Subchunk
from .indexing import bounds, ranges, upload

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
    """Exchange that gathers the hidden states one subchunk ahead and sums their gradients over ranks.

    A subchunk has [C, d] rows, ordered by rank.

    A reduce-scatter would round the partial sums to the dtype of the gradients at every hop of its ring, with an error
    that grows with R. Instead, each rank receives the [R, own rows, d] partial gradients of its own rows by all-to-all,
    and sums them in fp32. This takes as many bytes, but they would all pass between nodes. With several ranks per node,
    the ranks of a node therefore sum first, each for the rows of 1/g of all ranks, and then the nodes.

    Args:
        hidden: [T, d] hidden states of this rank.
        grad: [T, d] receives their gradient, or None.
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.
        gather: whether each rank needs the rows of all ranks. If not, it uses its own rows without communication.
        ranks_per_node: g, number of consecutive ranks that share a node.
    """

    def __init__(
        self, hidden: Tensor, grad: Tensor | None, group: Group, gather: bool, ranks_per_node: int = 1
    ) -> None:
        self.hidden, self.grad, self.group = hidden, grad, group
        self.rank, self.size = rank_and_size(group)
        self.gather = gather and self.size > 1
        two_levels = self.size % ranks_per_node == 0 and 1 < ranks_per_node < self.size
        self.ranks_per_node = ranks_per_node if two_levels else self.size
        self._reductions: list[Iterator[None]] = []

    def stream(self, subchunks: list[Subchunk]) -> Iterator[Tensor]:
        """Yield the [C, d] rows of each subchunk in turn, while the gather of the next one is in flight."""
        ahead = self._start(subchunks[0]) if subchunks else None
        for index, subchunk in enumerate(subchunks):
            assert ahead is not None
            work, buffer = ahead
            ahead = self._start(subchunks[index + 1]) if index + 1 < len(subchunks) else None
            if work is not None:
                work.wait()
            rows = [self._remove_padding(buffer, subchunk)]
            del work, buffer  # this generator must not keep what the caller has released
            yield rows.pop()

    def _start(self, subchunk: Subchunk) -> tuple[dist.Work | None, Tensor]:
        """Start the all-gather of a subchunk. Return its work handle and its (padded) buffer."""
        local = self.hidden[subchunk.local(self.rank)]
        if not self.gather:
            return None, local
        if len(local) < subchunk.max_count:
            local = torch.cat([local, local.new_zeros(subchunk.max_count - len(local), local.shape[1])])
        return start_all_gather(local, self.group)

    def _remove_padding(self, buffer: Tensor, subchunk: Subchunk) -> Tensor:
        if subchunk.is_even or not self.gather:
            return buffer
        first = torch.arange(self.size) * subchunk.max_count
        return self._select(buffer, first, subchunk.counts, subchunk.total)

    def _select(self, rows: Tensor, starts: Tensor, counts: Tensor, total: int) -> Tensor:
        """Concatenate ranges of rows. `starts` and `counts` are on the host."""
        starts, counts = upload([starts, counts], rows.device)
        return rows.index_select(0, ranges(starts, counts, total))

    def reduce(self, subchunk: Subchunk, grad: Tensor) -> None:
        """Start the sum of a subchunk's [C, d] gradients over ranks. Each rank receives the sum for its own rows.

        It is complete after two more calls, or after `finish`.
        """
        assert self.grad is not None
        out = self.grad[subchunk.local(self.rank)]
        if not self.gather:
            out.copy_(grad)
            return
        self._advance()
        self._reductions.append(self._reduction(subchunk, grad, out))
        next(self._reductions[-1])

    def finish(self) -> None:
        """Wait for the reductions in flight."""
        while self._reductions:
            self._advance()

    def _advance(self) -> None:
        """Complete the collective in flight of every reduction and start its next one."""
        done = object()
        self._reductions = [reduction for reduction in self._reductions if next(reduction, done) is not done]

    def _reduction(self, subchunk: Subchunk, grad: Tensor, out: Tensor) -> Iterator[None]:
        """Write the sum of the [C, d] gradients of all ranks to `out`, and yield while a collective is in flight.

        Args:
            subchunk: the subchunk of the rows.
            grad: [C, d] partial gradients on this rank.
            out: [own rows, d] sum for the rows of this rank.
        """
        counts, g, own, zeros = subchunk.count_list, self.ranks_per_node, len(out), [0] * self.size
        node, local = divmod(self.rank, g)
        if g < self.size:
            # Rows of the owners with local index 0 on all nodes, then those with local index 1, and so on.
            owners = torch.arange(self.size).view(-1, g).T.flatten()
            grad = self._select(grad, bounds(subchunk.counts)[owners], subchunk.counts[owners], subchunk.total)
        by_local_index = subchunk.counts.view(-1, g).sum(0).tolist()
        peers = slice(node * g, (node + 1) * g)
        sent, received = zeros.copy(), zeros.copy()
        sent[peers], received[peers] = by_local_index, [by_local_index[local]] * g
        work, partials = start_all_to_all(grad, sent, received, self.group)
        yield
        work.wait()
        dtype = grad.dtype
        del grad
        if g == self.size:
            out.copy_(sum_partials(partials, g))
            return
        sent, received = zeros.copy(), zeros.copy()
        sent[local::g], received[local::g] = counts[local::g], [own] * (self.size // g)
        work, partials = start_all_to_all(sum_partials(partials, g).to(dtype), sent, received, self.group)
        yield
        work.wait()
        out.copy_(sum_partials(partials, self.size // g))


def start_all_gather(tensor: Tensor, group: Group) -> tuple[dist.Work, Tensor]:
    """Start an all-gather of [n, ...] from all ranks. Return its work handle and the [R * n, ...] tensor to receive."""
    out = tensor.new_empty(rank_and_size(group)[1] * len(tensor), *tensor.shape[1:])
    return all_gather_single(out, tensor.contiguous(), group=group, async_op=True), out


def start_reduce_scatter(tensor: Tensor, group: Group) -> tuple[dist.Work, Tensor]:
    """Start a reduce-scatter of [R * n, ...]. Return its work handle and the [n, ...] sum to receive."""
    out = tensor.new_empty(len(tensor) // rank_and_size(group)[1], *tensor.shape[1:])
    return reduce_scatter_single(out, tensor, group=group, async_op=True), out


def start_all_to_all(tensor: Tensor, sent: list[int], received: list[int], group: Group) -> tuple[dist.Work, Tensor]:
    """Start an all-to-all of rows, see `all_to_all`. Return its work handle and the tensor to receive."""
    out = tensor.new_empty(sum(received), *tensor.shape[1:])
    return dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group, async_op=True), out


def sum_partials(partials: Tensor, count: int) -> Tensor:
    """Sum `count` consecutive blocks of rows, in fp32 for half precisions, or else in their dtype."""
    return partials.view(count, -1, partials.shape[-1]).sum(0, dtype=torch.promote_types(partials.dtype, torch.float32))

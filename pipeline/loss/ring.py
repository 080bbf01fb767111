"""The other way to divide the loss: each rank keeps its own rows, and the head's shards pass by on a ring.

It moves weights instead of activations, so it wins where the positions are many and the vocabulary is small:

    z = H W^T, softmax             a shard at a time, each on its way round: R - 1 hops
    pooled                         all-to-all [n, v]: to the owners of the columns, who make the summaries as ever
    directions                     all-to-all [m, v]: from the owners
    dz W, dz^T H                   a shard at a time once more; a shard's gradient follows it: R hops in fp32

No rank ever holds more than two shards and their gradients. All ranks take part in every hop, also without rows.
Shape letters: R ranks, V vocabulary, v rows of one shard, C own rows of a chunk, n sequences of the block, m moved
ones, d hidden size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.comm import Group, all_gather, all_to_all, world_of
from pipeline.loss.softmax import Chunk, ShardedSoftmax, SoftGradient, accumulation_dtype, add_product_
from pipeline.loss.vocabulary import Vocabulary


class GatheredSoftmax(ShardedSoftmax):
    """As its base, with this rank's rows against all columns."""

    def __init__(self, vocabulary: Vocabulary, temperature: float, group: Group) -> None:
        super().__init__(vocabulary, temperature, group)
        weight = vocabulary.head.weight
        self.rank, self.size = world_of(group)
        counts = all_gather(torch.tensor([len(weight)], device=weight.device), group)
        self.shares = counts.flatten().tolist()
        self.starts = [sum(self.shares[:r]) for r in range(self.size)]
        self.start, self.columns, self.row_group = 0, vocabulary.size, None
        self._tied = False
        if vocabulary.bias is not None:
            self.bias = torch.cat(self._everywhere(vocabulary.bias))
        if vocabulary.bias_grad is not None:
            self.bias_grad = vocabulary.bias_grad.new_zeros(vocabulary.size)

    def _everywhere(self, share: Tensor) -> list[Tensor]:
        """[v] of each rank."""
        padded = share.new_zeros(max(self.shares))
        padded[: len(share)] = share
        return [row[:v] for row, v in zip(all_gather(padded, self.group), self.shares, strict=True)]

    def _columns_of(self, owner: int) -> slice:
        return slice(self.starts[owner], self.starts[owner] + self.shares[owner])

    def _pass_on(self, tensor: Tensor, rows: int) -> tuple[list[dist.Work], Tensor]:
        """Send a shard to the next rank, and begin to receive one of that many rows from the one before."""
        received = tensor.new_empty(rows, tensor.shape[1])
        after, before = ((self.rank + step) % self.size for step in (1, -1))
        peers = [dist.get_global_rank(self.group, peer) for peer in (after, before)] if self.group else [0, 0]
        hops = [
            dist.P2POp(operation, part, peer, self.group)
            for operation, part, peer in zip((dist.isend, dist.irecv), (tensor, received), peers, strict=True)
            if part.numel()
        ]
        return dist.batch_isend_irecv(hops) if hops else [], received

    def _ring(self) -> Iterator[tuple[int, Tensor]]:
        """(owner, [v, d]) of every shard of the head, this rank's own first; the next is on its way meanwhile."""
        weight = self.vocabulary.head.weight
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            works: list[dist.Work] = []
            if step < self.size - 1:
                works, following = self._pass_on(weight, self.shares[owner - 1])
            yield owner, weight
            _wait(works)
            if step < self.size - 1:
                weight = following

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        for owner, weight in self._ring():
            out[:, self._columns_of(owner)] = hidden @ weight.T

    def _products(self, chunk: Chunk, weighted: Tensor, soft: SoftGradient | None, gain: float, unit: float) -> Tensor:
        head, dz = self.vocabulary.head, chunk.e
        if soft is not None:
            self._soft.append(soft)
        product = torch.zeros_like(chunk.hidden, dtype=accumulation_dtype(dz.dtype))
        works: list[dist.Work] = []
        grad = None if head.grad is None else torch.zeros_like(head.grad)
        for owner, weight in self._ring():
            mine = dz[:, self._columns_of(owner)]
            product += mine @ weight
            _wait(works)
            if grad is not None:
                add_product_(grad, mine.T, weighted, unit)
                works, grad = self._pass_on(grad, self.shares[owner - 1])
        _wait(works)
        if head.grad is not None and grad is not None:
            head.grad += grad
        return product

    def to_owners(self, pooled: Tensor, members: tuple[int, ...]) -> Tensor:
        own = members[self.rank]
        sent = torch.cat([part.flatten() for part in pooled.split(self.shares, dim=1)])
        received = [n * self.shares[self.rank] for n in members]
        return all_to_all(sent, [own * v for v in self.shares], received, self.group).view(sum(members), -1)

    def from_owners(self, directions: Tensor, moved: list[int]) -> Tensor:
        sent = [m * directions.shape[1] for m in moved]
        received = [moved[self.rank] * v for v in self.shares]
        parts = all_to_all(directions.flatten(), sent, received, self.group).split(received)
        return torch.cat([part.view(moved[self.rank], v) for part, v in zip(parts, self.shares, strict=True)], dim=1)

    def finish(self, unit: float) -> None:
        super().finish(unit)
        if self.vocabulary.bias_grad is not None and self.bias_grad is not None:
            sent, own = self.shares, self.shares[self.rank]
            parts = all_to_all(self.bias_grad, sent, [own] * self.size, self.group)
            self.vocabulary.bias_grad += parts.view(self.size, own).sum(0)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()

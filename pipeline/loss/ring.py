"""Ring head: each rank keeps its own hidden states, and the shards of the head are passed around a ring.

It communicates weights instead of activations, so it is faster with many target tokens and a small vocabulary:

    z = H W^T, softmax             one shard at a time, R - 1 hops
    pooled probabilities           all-to-all [n, v] to the owners of the columns, which compute the pooled
                                   representations as with the vocabulary-parallel head
    grad_probs                     all-to-all [m, v] from the owners
    dz W, dz^T H                   one shard at a time again, together with its fp32 gradient, R hops

No rank ever holds more than two shards and their gradients. All ranks participate in every hop, even if they have no
rows.
Shape letters: R ranks, V vocabulary, v rows of one shard, C rows of this rank in a subchunk, n sequences of the chunk,
m of them whose pooled representations require a gradient, d hidden size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.comm import Group, all_gather, all_to_all, rank_and_size
from pipeline.loss.kernels import add_product_
from pipeline.loss.softmax import ShardedSoftmax, accumulation_dtype
from pipeline.loss.softmax_state import SoftGradient, SoftmaxState
from pipeline.loss.vocabulary import Vocabulary


class RingSoftmax(ShardedSoftmax):
    """Softmax, pooling and products on one rank with the ring head: this rank's rows, all columns.

    Args:
        vocabulary: shards of this rank.
        temperature: divisor of the logits in the soft tokens' softmax.
        top_k: number of largest logits in the soft tokens' softmax, or None for all.
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.
    """

    def __init__(self, vocabulary: Vocabulary, temperature: float, top_k: int | None, group: Group) -> None:
        super().__init__(vocabulary, temperature, top_k, group)
        weight = vocabulary.head.weight
        self.rank, self.size = rank_and_size(group)
        counts = all_gather(torch.tensor([len(weight)], device=weight.device), group)
        self.shard_sizes = counts.flatten().tolist()
        self.starts = [sum(self.shard_sizes[:r]) for r in range(self.size)]
        self.start, self.columns, self.row_group = 0, vocabulary.size, None
        self._tied = False
        if vocabulary.bias is not None:
            self.bias = self._gather_shards(vocabulary.bias)
        if vocabulary.bias_grad is not None:
            self.bias_grad = vocabulary.bias_grad.new_zeros(vocabulary.size)

    def _gather_shards(self, local: Tensor) -> Tensor:
        """Gather the [v] tensors of all ranks into [V]."""
        padded = local.new_zeros(max(self.shard_sizes))
        padded[: len(local)] = local
        return torch.cat([row[:v] for row, v in zip(all_gather(padded, self.group), self.shard_sizes, strict=True)])

    def _columns_of(self, owner: int) -> slice:
        """Return the columns of the logits that belong to the shard of a rank."""
        return slice(self.starts[owner], self.starts[owner] + self.shard_sizes[owner])

    def _send_to_next(self, tensor: Tensor, rows: int) -> tuple[list[dist.Work], Tensor]:
        """Start sending a shard to the next rank and receiving a shard of `rows` rows from the previous rank."""
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
        """Yield (owner, [v, d] shard) for all shards of the head, this rank's first, with the next one in flight."""
        weight = self.vocabulary.head.weight
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            works: list[dist.Work] = []
            if step < self.size - 1:
                works, following = self._send_to_next(weight, self.shard_sizes[owner - 1])
            yield owner, weight
            _wait(works)
            if step < self.size - 1:
                weight = following

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        for owner, weight in self._ring():
            out[:, self._columns_of(owner)] = hidden @ weight.T

    def _products(
        self, state: SoftmaxState, weighted: Tensor, soft: SoftGradient | None, gain: float, grad_scale: float
    ) -> Tensor:
        head, dz = self.vocabulary.head, state.e
        if soft is not None:
            self._soft.append(soft)
        product = torch.zeros_like(state.hidden, dtype=accumulation_dtype(dz.dtype))
        works: list[dist.Work] = []
        grad = None if head.grad is None else torch.zeros_like(head.grad)
        for owner, weight in self._ring():
            dz_of_shard = dz[:, self._columns_of(owner)]
            product += dz_of_shard @ weight
            _wait(works)
            if grad is not None:
                add_product_(grad, dz_of_shard.T, weighted, grad_scale)
                works, grad = self._send_to_next(grad, self.shard_sizes[owner - 1])
        _wait(works)
        if head.grad is not None and grad is not None:
            head.grad += grad
        return product

    def to_column_owners(self, pooled: Tensor, sequence_counts: tuple[int, ...]) -> Tensor:
        own = sequence_counts[self.rank]
        sent = torch.cat([part.flatten() for part in pooled.split(self.shard_sizes, dim=1)])
        received = [n * self.shard_sizes[self.rank] for n in sequence_counts]
        parts = all_to_all(sent, [own * v for v in self.shard_sizes], received, self.group)
        return parts.view(sum(sequence_counts), -1)

    def from_column_owners(self, grad_probs: Tensor, requires_grad_of_rank: list[int]) -> Tensor:
        own = requires_grad_of_rank[self.rank]
        sent = [m * grad_probs.shape[1] for m in requires_grad_of_rank]
        received = [own * v for v in self.shard_sizes]
        parts = all_to_all(grad_probs.flatten(), sent, received, self.group).split(received)
        return torch.cat([part.view(own, v) for part, v in zip(parts, self.shard_sizes, strict=True)], dim=1)

    def finish(self, grad_scale: float) -> None:
        super().finish(grad_scale)
        if self.vocabulary.bias_grad is not None and self.bias_grad is not None:
            own = self.shard_sizes[self.rank]
            parts = all_to_all(self.bias_grad, self.shard_sizes, [own] * self.size, self.group)
            self.vocabulary.bias_grad += parts.view(self.size, own).sum(0)


def _wait(works: list[dist.Work]) -> None:
    """Wait for all transfers."""
    for work in works:
        work.wait()

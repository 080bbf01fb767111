"""Ring head: each rank keeps its own hidden states, and blocks of the head are gathered from all ranks.

It communicates weights instead of activations, so it is faster with many target tokens and a small vocabulary:

    z = H W^T, softmax             all-gather of a block of rows of each shard, one block ahead
    pooled probabilities           all-to-all [n, v] to the owners of the columns, which compute the pooled
                                   representations as with the vocabulary-parallel head
    grad_probs                     all-to-all [m, v] from the owners
    dz W, dz^T H                   all-gather of the same blocks again, and reduce-scatter of their fp32 gradients

No rank ever holds more than two blocks and their gradients, which `chunking.block_rows` limits to a part of the memory
budget. All ranks participate in every collective, even if they have no rows.
Shape letters: R ranks, V vocabulary, v rows of a partition (R * v is the padded vocabulary), b of them in a block,
C rows of this rank in a subchunk, n sequences of the chunk, m of them whose pooled representations require a gradient,
d hidden size.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from .comm import (
    Group,
    all_gather,
    all_to_all,
    rank_and_size,
    start_all_gather,
    start_reduce_scatter,
)
from .kernels import add_product_
from .softmax import ShardedSoftmax
from .softmax_state import SoftGradient, SoftmaxState, accumulation_dtype
from .vocabulary import Vocabulary


class RingSoftmax(ShardedSoftmax):
    """Softmax, pooling and products on one rank with the ring head: this rank's rows, all columns.

    Args:
        vocabulary: shards of this rank.
        temperature: divisor of the logits in the soft tokens' softmax.
        top_k: number of largest logits in the soft tokens' softmax, or None for all.
        group: process group that shards the vocabulary.
        hard: whether to pool the target tokens in place of soft tokens.
        alignment_factor: see `ShardedSoftmax`.
        block_rows: b.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        temperature: float,
        top_k: int | None,
        group: Group,
        hard: bool,
        alignment_factor: float,
        block_rows: int,
    ) -> None:
        super().__init__(vocabulary, temperature, top_k, group, hard, alignment_factor)
        self.rank, self.size = rank_and_size(group)
        self.shard_rows, self.block_rows = vocabulary.shard_rows(self.size), block_rows
        self.start, self.num_columns, self.row_group = 0, vocabulary.size, None
        # The column of a logit is its vocabulary id, and padding comes last, so rows [C, R * v] begin with [C, V].
        self.buffer_columns = self.size * self.shard_rows
        self._joint_gradient = False
        if vocabulary.bias is not None:
            own = pad(vocabulary.bias, (0, self.shard_rows - len(vocabulary.bias)))
            self.bias = all_gather(own, group).flatten()[: vocabulary.size]
        if vocabulary.bias_grad is not None:
            self.bias_grad = vocabulary.bias_grad.new_zeros(vocabulary.size)

    def _by_rank(self, z: Tensor) -> Tensor:
        """View [C, V] logits in a buffer as [C, R, v], with padding."""
        return z.as_strided((len(z), self.size, self.shard_rows), (z.stride(0), self.shard_rows, 1))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the partitions, and the [R * b, d] rows of all ranks, with the next block in flight."""
        slices = [
            slice(first, min(first + self.block_rows, self.shard_rows))
            for first in range(0, self.shard_rows, self.block_rows)
        ]
        ahead = self._gather(slices[0])
        for rows, following in zip(slices, [*slices[1:], None], strict=True):
            work, block = ahead
            if following is not None:
                ahead = self._gather(following)
            work.wait()
            yield rows, block

    def _gather(self, rows: slice) -> tuple[dist.Work, Tensor]:
        """Start gathering rows of all shards of the head. Missing rows of the last shards are 0."""
        own = self.vocabulary.head.weight[rows]
        return start_all_gather(pad(own, (0, 0, 0, rows.stop - rows.start - len(own))), self.group)

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        columns = self._by_rank(out)
        for rows, block in self._blocks():
            columns[:, :, rows] = (hidden @ block.T).unflatten(1, (self.size, -1))

    def _products(self, state: SoftmaxState, weighted: Tensor, soft: SoftGradient | None, grad_scale: float) -> Tensor:
        head, dz = self.vocabulary.head, self._by_rank(state.e)
        if soft is not None:
            self._soft.append(soft)
        product = torch.zeros_like(state.hidden, dtype=accumulation_dtype(state.e.dtype))
        reducing: tuple[dist.Work, Tensor, slice] | None = None
        for rows, block in self._blocks():
            dz_of_block = dz[:, :, rows].flatten(1)
            add_product_(product, dz_of_block, block, 1.0)
            if head.grad is not None:
                grad = torch.zeros_like(block, dtype=head.grad.dtype)
                add_product_(grad, dz_of_block.T, weighted, grad_scale)
                self._add_reduced(reducing)
                reducing = (*start_reduce_scatter(grad, self.group), rows)
        self._add_reduced(reducing)
        return product

    def _add_reduced(self, reducing: tuple[dist.Work, Tensor, slice] | None) -> None:
        """Wait for the reduce-scatter of a block's gradient, if any, and add it to this rank's gradient."""
        if reducing is not None and self.vocabulary.head.grad is not None:
            work, grad, rows = reducing
            work.wait()
            own = self.vocabulary.head.grad[rows]
            own += grad[: len(own)]

    def to_column_owners(self, pooled: Tensor, sequence_counts: Tensor) -> Tensor:
        by_rank = pad(pooled, (0, self.buffer_columns - pooled.shape[1])).unflatten(1, (self.size, -1))
        sent = by_rank.transpose(0, 1).reshape(-1, self.shard_rows)
        rows = all_to_all(sent, [len(pooled)] * self.size, sequence_counts.tolist(), self.group)
        return rows[:, : len(self.vocabulary.head.weight)]

    def from_column_owners(self, grad_probs: Tensor, requires_grad_of_rank: Tensor) -> Tensor:
        own = int(requires_grad_of_rank[self.rank])
        sent = pad(grad_probs, (0, self.shard_rows - grad_probs.shape[1]))
        rows = all_to_all(sent, requires_grad_of_rank.tolist(), [own] * self.size, self.group)
        by_rank = rows.view(self.size, own, self.shard_rows).transpose(0, 1)
        return by_rank.reshape(own, self.buffer_columns)[:, : self.vocabulary.size]

    def finish(self, grad_scale: float) -> None:
        super().finish(grad_scale)
        if self.vocabulary.bias_grad is not None and self.bias_grad is not None:
            work, own = start_reduce_scatter(
                pad(self.bias_grad, (0, self.buffer_columns - self.num_columns)), self.group
            )
            work.wait()
            self.vocabulary.bias_grad += own[: len(self.vocabulary.bias_grad)]

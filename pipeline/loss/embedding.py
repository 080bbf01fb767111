"""Lookup of input embeddings on vocabulary shards, by an all-to-all of rows and of their gradients.

Every rank requests the distinct rows of its tokens from the ranks that hold them. Each rank receives at most T*d
elements, independent of the vocabulary size:

    distinct ids, sorted, so they are grouped by owner
    counts, ids                    all-to-all [R], [U]
    rows of E                      all-to-all [U, d]
    backward: gradient summed over equal ids, then all-to-all [U, d] in fp32, into the owner's accumulator

The counts depend on the data only. If the caller exchanges them beforehand, the lookup does not wait for the device.

Shape letters: T tokens of this rank, R ranks, U distinct ids of this rank, Q rows requested from this rank by all
ranks, d hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .comm import Group, all_to_all, rank_and_size
from .vocabulary import VocabularyShard, partition_rows


@dataclass(frozen=True)
class DistinctIds:
    """The distinct token ids of a micro-batch.

    Attributes:
        ids: [U] distinct ids, ascending.
        inverse: [T] index of each token's id among the distinct ids.
        order: [T] tokens ordered by id.
        uses: [U] number of tokens with each id.
    """

    ids: Tensor
    inverse: Tensor
    order: Tensor
    uses: Tensor

    @classmethod
    def of(cls, input_ids: Tensor) -> "DistinctIds":
        """Return the distinct ids of a tensor of any shape."""
        ids, inverse, uses = input_ids.flatten().unique(return_inverse=True, return_counts=True)
        return cls(ids, inverse, inverse.argsort(stable=True), uses)

    def tensors(self) -> list[Tensor]:
        """Return the fields in order."""
        return [self.ids, self.inverse, self.order, self.uses]

    def counts_by_owner(self, padded_size: int, ranks: int) -> Tensor:
        """Return [R], the number of these ids whose row of the embedding each rank holds.

        Raises:
            ValueError: an id is outside [0, padded_size), or padded_size is not divisible by the number of ranks.
        """
        rows = partition_rows(padded_size, ranks)
        # The ids are sorted, so those of one owner are consecutive.
        ends = torch.searchsorted(self.ids, torch.arange(ranks + 1, device=self.ids.device) * rows)
        if len(self.ids) and (int(self.ids[0]) < 0 or int(self.ids[-1]) >= padded_size):
            raise ValueError(f"token ids {int(self.ids[0])} to {int(self.ids[-1])} are not all in [0, {padded_size})")
        return ends.diff()


@dataclass(frozen=True)
class LookupRoute:
    """Rows to exchange with each rank.

    Attributes:
        distinct: the distinct ids of this rank's tokens.
        requested_from: for each rank, the number of ids this rank requests from it.
        requested_by: for each rank, the number of ids it requests from this rank.
    """

    distinct: DistinctIds
    requested_from: list[int]
    requested_by: list[int]

    @classmethod
    def exchange(cls, input_ids: Tensor, padded_size: int, group: Group) -> "LookupRoute":
        """Exchange the counts of all ranks. Collective: all ranks must call it. Waits for the device."""
        distinct = DistinctIds.of(input_ids)
        counts = distinct.counts_by_owner(padded_size, rank_and_size(group)[1])
        return cls(distinct, counts.tolist(), all_to_all(counts, None, None, group).tolist())


def embedding_lookup(
    input_ids: Tensor,
    shard: VocabularyShard,
    padded_size: int,
    group: Group,
    grad_factor: float,
    route: LookupRoute | None = None,
) -> Tensor:
    """Look up rows of a sharded embedding; backward accumulates into `shard.grad`.

    Collective: all ranks must call forward and backward.

    Args:
        input_ids: [...] int64 token ids of this rank, below the unpadded vocabulary size. Shapes may differ between
            ranks and may be empty.
        shard: this rank's rows. Backward adds grad_factor * gradient to `shard.grad`, deterministically. If
            `shard.grad` is None (on all ranks or on none), backward does nothing.
        padded_size: rows of the ZeRO-3 parameter. Rank r has [r * padded_size / R, (r + 1) * padded_size / R).
        group: process group that shards the vocabulary, or None for a single process without one (not the default
            group, as in torch.distributed).
        grad_factor: compensates for a factor that the caller applies to the loss (number of ranks, loss scale).
        route: route of the same ids, on the device, if the counts have been exchanged (on all ranks or on none).

    Returns:
        [..., d] in the dtype of the shard. `requires_grad` is True if grad mode is enabled.

    Raises:
        ValueError: an id is outside [0, padded_size), or padded_size is not divisible by the world size.
    """
    if route is None:
        route = LookupRoute.exchange(input_ids, padded_size, group)
    requested = all_to_all(route.distinct.ids, route.requested_from, route.requested_by, group)
    # None of the inputs requires grad, so pass a dummy leaf that does; otherwise autograd would skip backward.
    leaf = torch.empty(0, requires_grad=True)
    rows = _Lookup.apply(leaf, shard, requested - shard.start, route, group, grad_factor)
    return rows.view(*input_ids.shape, rows.shape[-1])


class _Lookup(torch.autograd.Function):
    """Map the [Q] local rows requested by all ranks to the [T, d] rows of this rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        shard: VocabularyShard,
        requested: Tensor,
        route: LookupRoute,
        group: Group,
        grad_factor: float,
    ) -> Tensor:
        ctx.total, ctx.route, ctx.group, ctx.grad_factor = shard.grad, route, group, grad_factor
        ctx.save_for_backward(requested)
        rows = all_to_all(shard.weight[requested], route.requested_by, route.requested_from, group)
        return rows[route.distinct.inverse]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None, None, None]:
        (requested,) = ctx.saved_tensors
        route, distinct, total = ctx.route, ctx.route.distinct, ctx.total
        if total is None:
            return None, None, None, None, None, None
        # Not index_add_: on a GPU its atomics add equal indices in an order that varies between runs.
        sums = grad_outputs[0][distinct.order].to(total.dtype)
        if len(sums):
            # The lengths are valid; checking them would wait for the device.
            sums = torch.segment_reduce(sums, "sum", lengths=distinct.uses, axis=0, unsafe=True, initial=0)
        returned = all_to_all(sums, route.requested_from, route.requested_by, ctx.group).mul_(ctx.grad_factor)
        if total.is_cuda:
            total.index_put_((requested,), returned, accumulate=True)  # sorts the indices, so it is deterministic
        else:
            total.index_add_(0, requested, returned)
        return None, None, None, None, None, None

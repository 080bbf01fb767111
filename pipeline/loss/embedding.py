"""Lookup of input embeddings on vocabulary shards, by an all-to-all of rows and of their gradients.

Every rank requests the distinct rows of its tokens from the ranks that hold them. Each rank receives at most T*d
elements, independent of the vocabulary size:

    distinct ids, sorted, so they are grouped by owner
    counts, ids                    all-to-all [R], [U]
    rows of E                      all-to-all [U, d]
    backward: gradient summed over equal ids, then all-to-all [U, d] in fp32, into the owner's accumulator

Shape letters: T tokens of this rank, R ranks, U distinct ids of this rank, Q rows requested from this rank by all
ranks, d hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.loss.comm import Group, all_to_all, rank_and_size
from pipeline.loss.vocabulary import VocabularyShard


def embedding_lookup(
    input_ids: Tensor, shard: VocabularyShard, padded_size: int, group: Group, grad_factor: float
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

    Returns:
        [..., d] in the dtype of the shard. `requires_grad` is True if grad mode is enabled.

    Raises:
        ValueError: an id is outside [0, padded_size), or padded_size is not divisible by the world size.
    """
    requested, route = _exchange_requests(input_ids.flatten(), padded_size, group)
    # None of the inputs requires grad, so pass a dummy leaf that does; otherwise autograd would skip backward.
    leaf = torch.empty(0, requires_grad=True)
    rows = _Lookup.apply(leaf, shard, requested - shard.start, route, grad_factor)
    return rows.view(*input_ids.shape, rows.shape[-1])


@dataclass(frozen=True)
class _Route:
    """Rows to exchange with each rank.

    Attributes:
        inverse: [T] index of each token's id among the distinct ids.
        uses: [U] number of tokens with each distinct id.
        requested_from: for each rank, the number of ids this rank requests from it.
        requested_by: for each rank, the number of ids it requests from this rank.
        group: process group that shards the vocabulary, or None.
    """

    inverse: Tensor
    uses: Tensor
    requested_from: list[int]
    requested_by: list[int]
    group: Group


def _exchange_requests(ids: Tensor, padded_size: int, group: Group) -> tuple[Tensor, _Route]:
    """Exchange the row requests of all ranks.

    Returns:
        The [Q] ids requested from this rank, ordered by requesting rank, and the route of the rows.
    """
    _, size = rank_and_size(group)
    rows, remainder = divmod(padded_size, size)
    if remainder:
        raise ValueError(f"a padded vocabulary of {padded_size} rows is not divisible by {size} ranks: change either")
    distinct, inverse, uses = ids.unique(return_inverse=True, return_counts=True)
    # The ids are sorted, so those of one owner are consecutive.
    ends = torch.searchsorted(distinct, torch.arange(size + 1, device=ids.device) * rows)
    counts = ends.diff()
    requested_by = all_to_all(counts, None, None, group)
    below, from_list, by_list = ends[:1].tolist(), *torch.stack([counts, requested_by]).tolist()
    if below != [0] or sum(from_list) != len(distinct):
        raise ValueError(f"token ids {int(distinct[0])} to {int(distinct[-1])} are not all in [0, {padded_size})")
    return all_to_all(distinct, from_list, by_list, group), _Route(inverse, uses, from_list, by_list, group)


class _Lookup(torch.autograd.Function):
    """Map the [Q] local rows requested by all ranks to the [T, d] rows of this rank's tokens."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, shard: VocabularyShard, requested: Tensor, route: _Route, grad_factor: float
    ) -> Tensor:
        ctx.shard, ctx.route, ctx.grad_factor = shard, route, grad_factor
        ctx.save_for_backward(requested)
        rows = all_to_all(shard.weight[requested], route.requested_by, route.requested_from, route.group)
        return rows[route.inverse]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None, None]:
        (requested,) = ctx.saved_tensors
        route, total = ctx.route, ctx.shard.grad
        if total is None:
            return None, None, None, None, None
        # Not index_add_: on a GPU its atomics add equal indices in an order that varies between runs.
        sums = grad_outputs[0][route.inverse.argsort(stable=True)].to(total.dtype)
        if len(sums):
            sums = torch.segment_reduce(sums, "sum", lengths=route.uses, axis=0, initial=0)
        returned = all_to_all(sums, route.requested_from, route.requested_by, route.group)
        # The ids of each rank are distinct, and ranks are added in order, so the sum is deterministic.
        for ids, rows in zip(requested.split(route.requested_by), returned.split(route.requested_by), strict=True):
            total.index_add_(0, ids, rows, alpha=ctx.grad_factor)
        return None, None, None, None, None

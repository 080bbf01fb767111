"""Input embeddings on vocabulary shards: the rows a rank needs come to it, and their gradients go back.

Every rank asks each owner for the distinct rows of its tokens, so that at most T*d elements move per rank, whatever
the vocabulary:

    distinct ids, sorted, so grouped by owner
    counts, ids                    all-to-all [R], [U]
    rows of E                      all-to-all [U, d]
    backward: gradient summed over equal ids, then all-to-all [U, d] in fp32, into the owner's accumulator

Shape letters: R ranks, U distinct ids of this rank, Q rows asked of this rank by all, d hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.loss.comm import Group, all_to_all, world_of
from pipeline.loss.vocabulary import VocabularyShard


def embedding_lookup(
    input_ids: Tensor, shard: VocabularyShard, padded_size: int, group: Group, grad_factor: float
) -> Tensor:
    """Rows of a sharded embedding, differentiable into `shard.grad`. A collective: forward, and again backward.

    Args:
        input_ids: [...] int64 token ids of this rank, below the vocabulary's real size; ranks may have different
            shapes, also empty ones.
        shard: this rank's rows. Backward adds grad_factor * gradient to `shard.grad` (nothing where it is None,
            on all ranks alike), bit for bit the same on every run.
        padded_size: rows of the ZeRO-3 parameter; rank r has [r * padded_size / R, (r + 1) * padded_size / R).
        group: the ranks that share the vocabulary; None for one process.
        grad_factor: undoes what the caller put on the loss (number of ranks, loss scale).

    Returns:
        [..., d] in the dtype of the shard. It requires a gradient wherever autograd is on.

    Raises:
        ValueError: an id outside [0, padded_size), or ranks that do not divide it.
    """
    asked, route = _ask(input_ids.flatten(), padded_size, group)
    # No input is differentiable; without a leaf that is, autograd would never call backward.
    leaf = torch.empty(0, requires_grad=True)
    rows = _Lookup.apply(leaf, shard, asked - shard.start, route, grad_factor)
    return rows.view(*input_ids.shape, rows.shape[-1])


@dataclass(frozen=True)
class _Route:
    """`place`: position -> its distinct id [0, U); `uses` [U]: positions of each. Ids asked of, and by, each rank."""

    place: Tensor
    uses: Tensor
    asked_of: list[int]
    asked_by: list[int]
    group: Group


def _ask(ids: Tensor, padded_size: int, group: Group) -> tuple[Tensor, _Route]:
    """[Q] ids asked of this rank, rank after rank, and the way back."""
    _, size = world_of(group)
    rows, remainder = divmod(padded_size, size)
    if remainder:
        raise ValueError(f"{size} ranks do not divide a padded vocabulary of {padded_size}")
    distinct, place, uses = ids.unique(return_inverse=True, return_counts=True)
    # Sorted, so that the owners' shares are consecutive.
    ends = torch.searchsorted(distinct, torch.arange(size + 1, device=ids.device) * rows)
    counts = ends.diff()
    asked_by = all_to_all(counts, None, None, group)
    below, asked_of_list, asked_by_list = ends[:1].tolist(), *torch.stack([counts, asked_by]).tolist()
    if below != [0] or sum(asked_of_list) != len(distinct):
        raise ValueError(f"token ids {int(distinct[0])} to {int(distinct[-1])} are not all in [0, {padded_size})")
    route = _Route(place, uses, asked_of_list, asked_by_list, group)
    return all_to_all(distinct, asked_of_list, asked_by_list, group), route


class _Lookup(torch.autograd.Function):
    """[T, d] rows for the asked [Q] local rows."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, shard: VocabularyShard, asked: Tensor, route: _Route, grad_factor: float
    ) -> Tensor:
        ctx.shard, ctx.route, ctx.grad_factor = shard, route, grad_factor
        ctx.save_for_backward(asked)
        rows = all_to_all(shard.weight[asked], route.asked_by, route.asked_of, route.group)
        return rows[route.place]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None, None]:
        (asked,) = ctx.saved_tensors
        route, total = ctx.route, ctx.shard.grad
        if total is None:
            return None, None, None, None, None
        # Not index_add_: on a GPU it sums equal indices in whatever order their atomics arrive.
        sums = grad_outputs[0][route.place.argsort(stable=True)].to(total.dtype)
        if len(sums):
            sums = torch.segment_reduce(sums, "sum", lengths=route.uses, axis=0, initial=0)
        returned = all_to_all(sums, route.asked_of, route.asked_by, route.group)
        # One rank's ids are distinct, so its rows meet no other; the ranks come in their order.
        for ids, rows in zip(asked.split(route.asked_by), returned.split(route.asked_by), strict=True):
            total.index_add_(0, ids, rows, alpha=ctx.grad_factor)
        return None, None, None, None, None

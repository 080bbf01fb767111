"""Gather the layout of the target tokens of all ranks.

Shape letters: T target tokens of this rank, A of all ranks, S sequences of all ranks.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.loss.chunking import Chunk
from pipeline.loss.comm import Group, all_gather, all_gather_uneven, rank_and_size
from pipeline.loss.loss_batch import LossBatch


@dataclass(frozen=True)
class GlobalLayout:
    """Layout of the target tokens of all ranks, on the host. Equal on all ranks.

    Target tokens and sequences are ordered by rank after gathering, and in chunk order after `in_chunk_order`.

    Attributes:
        rank_lengths, rank_pivots: for each rank and sequence, the number of target tokens, and the index of the pivot
            in that rank's list.
        targets, pooling_weights, ce_weights, sequence: [A] target id, pooling weight, cross-entropy weight and
            sequence index of each target token.
        pivot, problem_id, language, lengths: [S], as in `LossBatch`.
    """

    rank_lengths: list[list[int]]
    rank_pivots: list[list[int]]
    targets: Tensor
    pooling_weights: Tensor
    ce_weights: Tensor
    sequence: Tensor
    pivot: Tensor
    problem_id: Tensor
    language: Tensor
    lengths: Tensor

    def in_chunk_order(self, chunks: list[Chunk], order: list[tuple[int, int]]) -> "GlobalLayout":
        """Return the layout with target tokens and sequences in the order that `schedule` returned."""
        first_token = list(accumulate(map(sum, self.rank_lengths), initial=0))
        first_sequence = list(accumulate(map(len, self.rank_lengths), initial=0))
        ranges = [torch.arange(0)]
        for subchunk in (subchunk for chunk in chunks for subchunk in chunk.subchunks):
            ranges += [torch.arange(s + a, s + b) for s, (a, b) in zip(first_token, subchunk.ranges, strict=False)]
        tokens = torch.cat(ranges)
        old = torch.tensor([first_sequence[rank] + i for rank, i in order], dtype=torch.int64)
        new = torch.empty_like(old)
        new[old] = torch.arange(len(old))
        return replace(
            self,
            targets=self.targets[tokens],
            pooling_weights=self.pooling_weights[tokens],
            ce_weights=self.ce_weights[tokens],
            sequence=new[self.sequence[tokens]],
            pivot=new[self.pivot[old]],
            problem_id=self.problem_id[old],
            language=self.language[old],
            lengths=self.lengths[old],
        )


def gather_layout(
    local: LossBatch, pooling: str, dtype: torch.dtype, device: torch.device, group: Group
) -> GlobalLayout:
    """Gather the layout of all ranks with three small all-gathers. Collective: all ranks must call it.

    The remaining work is done on the host, because it takes less time than kernel launches on a GPU.

    Args:
        local: layout of this rank.
        pooling: `mean`, `last` or `weights`.
        dtype: dtype of the weights.
        device: device of the all-gathers.
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.

    Raises:
        ValueError: `pooling` is `weights` and `local` has no token weights.
    """
    local = local.to("cpu")
    _, size = rank_and_size(group)
    local_counts = torch.tensor([len(local.targets), len(local.lengths)])
    # A single rank stays on the host to avoid synchronizing with its device.
    counts = all_gather(local_counts.to(device) if size > 1 else local_counts, group).tolist()
    splits = [s for _, s in counts]
    starts = list(accumulate(splits, initial=0))[:-1]

    ce = torch.ones_like(local.lengths) if local.ce_weights is None else local.ce_weights
    sequence_fields = torch.stack([local.lengths, local.pivot, local.problem_id, local.language])
    integers_R = [torch.cat([local.targets, sequence_fields.flatten()])]
    weights_R = [torch.cat([local.pooling_weights(pooling, dtype), ce.to(dtype)[local.sequence_of_token()]])]
    if size > 1:
        integers_R = all_gather_uneven(integers_R[0].to(device), [t + 4 * s for t, s in counts], group)
        weights_R = all_gather_uneven(weights_R[0].to(device), [2 * t for t, _ in counts], group)

    fields_R = [row[t:].view(4, s) for row, (t, s) in zip(integers_R, counts, strict=True)]
    lengths, pivot, problem_id, language = torch.cat(fields_R, dim=1)
    pivot_R = pivot.split(splits)
    return GlobalLayout(
        rank_lengths=[part.tolist() for part in lengths.split(splits)],
        rank_pivots=[part.tolist() for part in pivot_R],
        targets=torch.cat([row[:t] for row, (t, _) in zip(integers_R, counts, strict=True)]),
        pooling_weights=torch.cat([row[:t] for row, (t, _) in zip(weights_R, counts, strict=True)]),
        ce_weights=torch.cat([row[t:] for row, (t, _) in zip(weights_R, counts, strict=True)]),
        sequence=torch.repeat_interleave(lengths),
        pivot=torch.cat([part + start for part, start in zip(pivot_R, starts, strict=True)]),
        problem_id=problem_id,
        language=language,
        lengths=lengths,
    )


def upload(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy host tensors of one dtype to the device in a single transfer, without waiting for the device.

    Returns:
        The tensors on the device, with their original shapes.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

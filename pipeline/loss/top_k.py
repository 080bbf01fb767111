"""Select the k largest logits of each row over the whole vocabulary (S). Their softmax is the soft token's q.

Among equal logits, the one with the lower id comes first. The k largest entries of a row lie in its k blocks with the
largest maxima, so a row is read only once, to compute the block maxima. On a GPU the softmax's kernel does this. With
the vocabulary-parallel head, each rank selects from its own columns, and the ranks share the work of merging their
lists, 1/R of the rows each:

    k largest logits of each rank      [C, k]   all-to-all: each rank receives the lists of its rows
    merge: size of S on each rank, largest logit, two sums of exponentials, entropy of q
    results                            [C, 5]   all-to-all back

Each rank thus receives k + 5 numbers per row, whatever the number of ranks. It needs no ids: the list of a rank is
sorted, so its part of S is the beginning of the list.

Shape letters: C rows (target tokens) of the subchunk, v vocabulary rows of this rank (columns of the logits),
j = min(k, v) entries selected on this rank, n sequences of the chunk, m of them whose pooled representations require a
gradient, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import kernels
from .comm import Group, all_reduce, all_to_all, rank_and_size
from .kernels import SubchunkTokens

BLOCK = 32  # columns of a block; smaller blocks have fewer candidates, but more maxima


@dataclass(frozen=True)
class TopKStatistics:
    """Results of the merge, [C] each.

    Attributes:
        count: number of entries of S among this rank's columns.
        largest: largest logit of the row.
        total: sum over S of exp((z - largest) / temperature).
        mass: the same sum at temperature 1.
        entropy: entropy of q, in nats.
    """

    count: Tensor
    largest: Tensor
    total: Tensor
    mass: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class TopKMixture:
    """This rank's part of q.

    Attributes:
        columns: [C, j] columns of the j largest logits of this rank.
        probabilities: [C, j] q at these columns, 0 outside S.
    """

    columns: Tensor
    probabilities: Tensor


def positions_of_largest(values_Cn: Tensor, k: int) -> Tensor:
    """Return the [C, k] positions of the k largest values of each row, in ascending order. Ties: lower position."""
    n = values_Cn.shape[1]
    if n <= k:
        return torch.arange(n, device=values_Cn.device).expand(len(values_Cn), n)
    largest = values_Cn.topk(k + 1)
    threshold, next_value = largest.values[:, k - 1 : k], largest.values[:, k:]
    positions = largest.indices[:, :k]
    # torch.topk selects arbitrary entries among those equal to the k-th largest. If there are more of them than it
    # selected, rank them by position. On a GPU, do so always: checking would wait for the device.
    if values_Cn.is_cuda or bool((threshold == next_value).any()):
        from_end = torch.arange(n, 0, -1, device=values_Cn.device, dtype=torch.int32)
        for rows in kernels.row_tiles(values_Cn, 0, len(values_Cn)):
            values = values_Cn[rows]
            ties = torch.where(values == threshold[rows], from_end, 0)
            positions[rows] = torch.where(values > threshold[rows], n + 1, ties).topk(k).indices
    return positions.sort(dim=1).values


def largest_logits(z_Cv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the values and columns, [C, j] each, of the j = min(k, v) largest logits of each row, largest first."""
    rows, v = z_Cv.shape
    blocks = v // BLOCK if rows else 0
    if blocks <= k:
        columns = positions_of_largest(z_Cv, k)
        candidates = z_Cv
    else:
        in_blocks = z_Cv[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
        starts = positions_of_largest(in_blocks.amax(2), k) * BLOCK
        stride = z_Cv.stride(0)
        offsets = (starts + torch.arange(0, rows * stride, stride, device=z_Cv.device)[:, None]).flatten()
        # Row i of `runs` is the BLOCK elements from i on, so index_select copies whole blocks for any v and stride.
        runs = z_Cv.as_strided(((rows - 1) * stride + v - BLOCK + 1, BLOCK), (1, 1))
        candidates = runs.index_select(0, offsets).view(rows, k * BLOCK)
        if v % BLOCK:
            candidates = torch.cat([candidates, z_Cv[:, blocks * BLOCK :]], dim=1)
        columns = positions_of_largest(candidates, k)
    values, order = candidates.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if blocks > k:
        in_block = columns < k * BLOCK
        block_start = starts.gather(1, torch.where(in_block, columns // BLOCK, 0))
        columns = torch.where(in_block, block_start + columns % BLOCK, columns + (blocks - k) * BLOCK)
    return values, columns


def softmax_with_largest_(z_Cv: Tensor, k: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Select the largest logits and replace z by its softmax. Return the results of `softmax_` and `largest_logits`."""
    on_gpu = kernels.softmax_with_largest_(z_Cv, k, BLOCK)
    if on_gpu is not None:
        return on_gpu
    values, columns = largest_logits(z_Cv, k)
    return kernels.softmax_(z_Cv, 1.0, values), values, columns


def merge(values_Cj: Tensor, k: int, temperature: float, group: Group) -> TopKStatistics:
    """Merge the lists of all ranks. Collective: all ranks must call it.

    Args:
        values_Cj: [C, j] largest logits of this rank, in descending order.
        k: number of logits to select from each row, at most the size of the vocabulary.
        temperature: divisor of the logits.
        group: ranks that hold the other columns of the same rows, in the order of their columns; None if this rank
            holds all columns.
    """
    rank, ranks = rank_and_size(group)
    count, selected = values_Cj.shape
    rows_of_rank = (torch.arange(ranks + 1) * count // ranks).diff().tolist()
    rows = rows_of_rank[rank]
    sent = values_Cj if selected == k else pad(values_Cj, (0, k - selected), value=-torch.inf)
    lists = all_to_all(sent, rows_of_rank, [rows] * ranks, group).view(ranks, rows, k)
    # Candidates are ordered by rank, so equal logits are ordered by id.
    candidates = lists.transpose(0, 1).reshape(rows, ranks * k)
    dtype = torch.promote_types(values_Cj.dtype, torch.float32)
    if ranks == 1:
        values, counts = candidates.to(dtype), candidates.new_full((rows, 1), k, dtype=dtype)
    else:
        positions = positions_of_largest(candidates, k)
        values = candidates.gather(1, positions).to(dtype)
        counts = values.new_zeros(rows, ranks).scatter_add_(1, positions // k, torch.ones_like(values))
    largest = values.amax(1)
    differences = values - largest[:, None]
    exponentials = _divided(differences, temperature).exp()
    total = exponentials.sum(1)
    mass = total if temperature == 1 else differences.exp().sum(1)
    q = exponentials / total[:, None]
    common = torch.stack([largest, total, mass, -torch.xlogy(q, q).sum(1)], dim=1)
    results = torch.cat([counts.T[:, :, None], common.expand(ranks, rows, 4)], dim=2).flatten(0, 1)
    return TopKStatistics(*all_to_all(results, [rows] * ranks, rows_of_rank, group).unbind(1))


def top_k_mixture(values_Cj: Tensor, columns_Cj: Tensor, statistics: TopKStatistics, temperature: float) -> TopKMixture:
    """Compute this rank's part of q from its largest logits and the results of the merge."""
    largest, total = statistics.largest[:, None], statistics.total[:, None]
    q = _divided(values_Cj.to(total.dtype) - largest, temperature).exp() / total
    in_s = torch.arange(q.shape[1], device=q.device) < statistics.count[:, None]
    return TopKMixture(columns_Cj, torch.where(in_s, q, 0))


def _divided(values: Tensor, temperature: float) -> Tensor:
    return values if temperature == 1 else values / temperature


def one_hot(columns_C1: Tensor, local_C: Tensor, dtype: torch.dtype, columns: int) -> TopKMixture:
    """Return this rank's part of the one-hot distribution of the targets.

    Args:
        columns_C1: [C, 1] column of each target; any column if it is on another rank.
        local_C: [C] whether it is on this rank.
        dtype: dtype of the probabilities.
        columns: v, which may be 0.
    """
    selected = min(1, columns)
    return TopKMixture(columns_C1[:, :selected], local_C[:, None].to(dtype)[:, :selected])


def pool_top_k(mixture: TopKMixture, tokens: SubchunkTokens, columns: int) -> Tensor:
    """Compute [n, v]: the sum of pooling weight * q over the rows of each sequence. `columns` is v."""
    sequences = len(tokens.grad_index_of_sequence)
    weighted = (tokens.pooling_weights[:, None] * mixture.probabilities).flatten()
    index = (tokens.sequence[:, None] * columns + mixture.columns).flatten()
    pooled = weighted.new_zeros(sequences * columns)
    if pooled.is_cuda:
        pooled.index_put_((index,), weighted, accumulate=True)  # deterministic on a GPU, unlike index_add_
    else:
        pooled.index_add_(0, index, weighted)
    return pooled.view(sequences, columns)


def grad_logits(
    mixture: TopKMixture, grad_probs_mv: Tensor, tokens: SubchunkTokens, factor_C: Tensor, group: Group
) -> Tensor:
    """Compute the [C, j] gradient of the sum of distances with respect to the logits at the columns of `mixture`.

    Collective over `group`, as `merge`.

    Args:
        mixture: this rank's part of q.
        grad_probs_mv: [m, v] gradient with respect to the pooled probabilities.
        tokens: the target tokens of the subchunk.
        factor_C: [C] factor of the gradient, which includes 1 / temperature.
        group: as in `merge`.
    """
    q, index = mixture.probabilities, tokens.grad_index
    if grad_probs_mv.numel():
        c = grad_probs_mv[index.clamp_min(0)[:, None], mixture.columns].to(q.dtype)
    else:
        c = torch.zeros_like(q)
    inner = all_reduce((q * c).sum(1), group)
    slope = torch.where(index >= 0, tokens.pooling_weights * factor_C, 0)
    return slope[:, None] * q * (c - inner[:, None])

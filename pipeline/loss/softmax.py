"""One chunk of logits on this rank's vocabulary rows: softmax, pooling, and the products that carry gradients.

Shape letters: C rows (positions) of the chunk, v vocabulary rows of this rank, n sequences of the block, m moved ones
(whose summaries have a gradient), R ranks, d hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.loss.comm import Group, all_gather, all_reduce
from pipeline.loss.kernels import Rows, cap_, inner_products, pool, softmax_, tilt_, times_embedding
from pipeline.loss.settings import LossSettings
from pipeline.loss.vocabulary import Vocabulary

# fp16 cannot hold e next to its row sum; there dz is normalised, and kept this much larger against underflow.
FP16_GAIN = 64.0
# Of a rank's share of a row's probability, its logarithm: below it, dz at the target would leave fp32's range.
SMALLEST_LOG_SHARE = -60.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def rows_that_fit(vocabulary: Vocabulary, settings: LossSettings) -> int:
    """Rows of each rank in one chunk. A shared chunk has R times as many, on a vocabulary R times smaller."""
    weight = vocabulary.head.weight
    row_bytes = vocabulary.size * weight.element_size()
    return rows_in_budget(settings, row_bytes, vocabulary.softcap is not None, weight.is_cuda)


def rows_in_budget(settings: LossSettings, row_bytes: int, softcap: bool, gpu: bool) -> int:
    """The same from numbers alone; `row_bytes`: of one row of logits over the whole vocabulary."""
    tensors = 1 + (settings.softmax_temperature != 1) + softcap
    budget_mb = settings.memory_budget_mb or (2048 if gpu else 64)
    return max(1, int(budget_mb * 2**20 / (row_bytes * tensors)))


@dataclass(frozen=True)
class Statistics:
    """Of a chunk's rows, [C] each.

    Attributes:
        cross_entropy: -log p(target) over the whole vocabulary.
        scale, tilted_scale: e * scale is the softmax over the whole vocabulary; likewise for `tilted`.
        target, tilted_target: e and `tilted` at the target before rounding, where this rank owns it.
    """

    cross_entropy: Tensor
    scale: Tensor
    tilted_scale: Tensor
    target: Tensor
    tilted_target: Tensor


@dataclass(frozen=True)
class Chunk:
    """A softmax in work: `e` [C, v] in proportion to exp(z), `tilted` to exp(z / temperature), the same tensor at 1.

    `cap_slope` [C, v] is the derivative of a soft cap. `whole` [C + n, v] is e and, where head
    and embedding are one, room for as many rows as there are sequences.
    """

    rows: Rows
    hidden: Tensor
    e: Tensor
    whole: Tensor
    tilted: Tensor
    cap_slope: Tensor | None
    statistics: Statistics


@dataclass(frozen=True)
class SoftGradient:
    """What the embedding's gradient pooled^T grad_u is made of: [m, v] and [m, d] of a block's moved sequences."""

    pooled: Tensor
    grad_u: Tensor


class ShardedSoftmax:
    """The vocabulary-sized work of the loss for one rank: all ranks' rows against its own columns."""

    def __init__(self, vocabulary: Vocabulary, temperature: float, group: Group) -> None:
        self.vocabulary, self.temperature, self.group = vocabulary, temperature, group
        # The columns of a chunk, and the ranks that have its other columns.
        self.start, self.columns, self.row_group = vocabulary.head.start, len(vocabulary.head.weight), group
        self.bias, self.bias_grad = vocabulary.bias, vocabulary.bias_grad
        self._tied = vocabulary.embedding is vocabulary.head
        self._soft: list[SoftGradient] = []
        self._buffers: dict[str, Tensor] = {}

    def softmax(self, rows: Rows, hidden: Tensor, known: Statistics | None) -> Chunk:
        """Logits (product 1) and their softmax; one small all-gather unless the statistics are known."""
        vocabulary = self.vocabulary
        room = len(rows.moved_of) if self._tied else 0
        whole = self._buffer("z", len(hidden) + room, hidden)
        z = whole[: len(hidden)]
        if vocabulary.logit_scale != 1:
            hidden = hidden * vocabulary.logit_scale
        self._logits(hidden, z)
        if self.bias is not None:
            z.add_(self.bias)
        cap_slope = None
        if vocabulary.softcap is not None:
            cap_slope = cap_(z, vocabulary.softcap, self._buffer("slope", len(z), z))

        columns, owned = self._columns(rows)
        target = torch.where(owned, z.gather(1, columns).squeeze(1).to(rows.ce.dtype), 0) if z.numel() else owned * 0.0
        tilted = z
        if self.temperature != 1:
            tilted = self._buffer("tilted", len(z), z).copy_(z)
        log_sum, total = softmax_(z, 1.0)
        tilted_log_sum, tilted_total = softmax_(tilted, self.temperature) if tilted is not z else (log_sum, total)
        if known is None:
            known = self._statistics(target, log_sum, total, tilted_log_sum, tilted_total)
        return Chunk(rows, hidden, z, whole, tilted, cap_slope, known)

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        torch.mm(hidden, self.vocabulary.head.weight.T, out=out)

    def _statistics(
        self, target: Tensor, log_sum: Tensor, total: Tensor, tilted_log_sum: Tensor, tilted_total: Tensor
    ) -> Statistics:
        """All arguments [C], of this rank's columns; `target` is the logit, 0 where another rank has it."""
        ranks = all_gather(torch.stack([log_sum, tilted_log_sum, target]), self.row_group)
        everywhere, tilted_everywhere = ranks[:, :2].logsumexp(0)
        return Statistics(
            cross_entropy=everywhere - ranks[:, 2].sum(0),
            scale=(log_sum - everywhere).clamp_min(SMALLEST_LOG_SHARE).exp() / total,
            tilted_scale=(tilted_log_sum - tilted_everywhere).exp() / tilted_total,
            target=(target - log_sum).exp() * total,
            tilted_target=(target / self.temperature - tilted_log_sum).exp() * tilted_total,
        )

    def pool(self, chunk: Chunk) -> Tensor:
        """[n, v] sum over each sequence's rows of pooling weight * probability."""
        return pool(chunk.tilted, chunk.rows.pooling * chunk.statistics.tilted_scale, chunk.rows)

    def summaries(self, pooled: Tensor) -> Tensor:
        """[n, v] mean probabilities to [n, d] soft-token summaries, over all ranks' vocabulary rows."""
        embedding = self.vocabulary.embedding.weight
        return all_reduce(
            times_embedding(self._weigh(pooled).to(embedding.dtype), embedding).to(pooled.dtype), self.group
        )

    def directions(self, grad_u: Tensor) -> Tensor:
        """[m, d] gradient of the summaries to [m, v], that of each sequence's pooled probabilities, in E's dtype."""
        embedding = self.vocabulary.embedding.weight
        # In this order a CPU reads E once, at the speed of its memory.
        directions = (embedding @ grad_u.to(embedding.dtype).T).T.contiguous()
        weights = self.vocabulary.weights
        return directions if weights is None else (directions * weights).to(directions.dtype)

    def backward(self, chunk: Chunk, directions: Tensor | None, soft: SoftGradient | None, unit: float) -> Tensor:
        """dz in place of e, then products 2 and 3.

        `soft`, where given, goes into the embedding's accumulator: along with product 3 where it is the head's, else
        in `finish`.

        Returns [C, d] this rank's part of dH, divided by `unit` (and times `gain` of its dtype); adds to the head's
        accumulator the exact unit * dz^T H.
        """
        rows, s = chunk.rows, chunk.statistics
        # dz = scale * (e' - target's share), where e' is e times `ce`, tilted by the alignment gradient.
        scale, at_target = s.scale * rows.ce, s.target - 1 / s.scale
        if directions is not None:
            moved = rows.moved >= 0
            scale = torch.where(moved, s.scale, scale)
            at_target = torch.where(moved, self._tilt(chunk, directions, rows.ce * at_target), at_target)
        dz = chunk.e
        if dz.dtype == torch.float16:
            scale = scale * FP16_GAIN
            dz.mul_(scale[:, None])
            at_target, scale = at_target * scale, torch.ones_like(scale)
        columns, owned = self._columns(rows)
        if dz.numel():
            dz.scatter_(1, columns, torch.where(owned[:, None], at_target[:, None].to(dz.dtype), dz.gather(1, columns)))
        if chunk.cap_slope is not None:
            dz.mul_(chunk.cap_slope)

        gain = FP16_GAIN if dz.dtype == torch.float16 else 1.0
        if self.bias_grad is not None:
            self.bias_grad.add_((dz.T @ scale.to(dz.dtype)).to(self.bias_grad.dtype), alpha=unit / gain)
        weighted = (chunk.hidden * scale[:, None]).to(dz.dtype)
        product = self._products(chunk, weighted, soft, gain, unit / gain)
        return (product * (scale * self.vocabulary.logit_scale)[:, None]).to(dz.dtype)

    def _products(self, chunk: Chunk, weighted: Tensor, soft: SoftGradient | None, gain: float, unit: float) -> Tensor:
        """head's gradient += unit * dz^T weighted (and `soft`); returns dz W. `chunk.e` is dz by now."""
        head, dz = self.vocabulary.head, chunk.e
        if soft is not None and not self._tied:
            self._soft.append(soft)
        elif soft is not None:
            dz = chunk.whole[: len(chunk.e) + len(soft.pooled)]
            dz[len(chunk.e) :] = self._weigh(soft.pooled) * gain
            weighted = torch.cat([weighted, soft.grad_u.to(weighted.dtype)])
        if head.grad is not None:
            add_product_(head.grad, dz.T, weighted, unit)
        return chunk.e @ head.weight

    def to_owners(self, pooled: Tensor, members: tuple[int, ...]) -> Tensor:
        """Pooled probabilities of this rank's columns and all ranks' sequences, [n, v]: what `pool` gives."""
        return pooled

    def from_owners(self, directions: Tensor, moved: list[int]) -> Tensor:
        """Directions for the rows and columns of this rank's chunks, [m, v]: what `directions` gives."""
        return directions

    def finish(self, unit: float) -> None:
        """dE += unit * pooled^T g of all blocks, where the embedding is not the head."""
        if self._soft and self.vocabulary.embedding.grad is not None:
            pooled = self._weigh(torch.cat([soft.pooled for soft in self._soft]))
            add_product_(
                self.vocabulary.embedding.grad, pooled.T, torch.cat([soft.grad_u for soft in self._soft]), unit
            )

    def _weigh(self, pooled: Tensor) -> Tensor:
        return pooled if self.vocabulary.weights is None else pooled * self.vocabulary.weights

    def _tilt(self, chunk: Chunk, directions: Tensor, at_target: Tensor) -> Tensor:
        """e <- ce * e + k * tilted * (direction - <p, direction>) in rows of moved sequences.

        `at_target` [C]: ce times the value at the target; returns it with the alignment's part.
        """
        rows, s = chunk.rows, chunk.statistics
        inner = all_reduce(inner_products(chunk.tilted, directions, rows) * s.tilted_scale, self.row_group)
        k = rows.pooling * s.tilted_scale / (s.scale * self.temperature)
        tilt_(chunk.e, chunk.tilted, rows.ce, k, inner, directions, rows)
        if directions.numel() == 0:
            return at_target
        columns, _ = self._columns(rows)
        here = directions[rows.moved.clamp_min(0), columns.squeeze(1)]
        return at_target + k * s.tilted_target * (here - inner)

    def _columns(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """[C, 1] the target's column here, and [C] whether it is here; some column where it is not."""
        columns = rows.targets - self.start
        return columns.clamp(0, max(0, self.columns - 1))[:, None], (columns >= 0) & (columns < self.columns)

    def _buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """[rows, v], reused by every chunk of the call."""
        size = rows * self.columns
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = like.new_empty(size)
        return held[:size].view(rows, self.columns)


def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha * a @ b, summed in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(total, a, b, alpha=alpha, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b, alpha=alpha)

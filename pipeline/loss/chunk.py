"""One chunk of logits on this rank's vocabulary rows: softmax, pooling, and the products that carry gradients.

Shape letters: C rows (positions) of the chunk, v vocabulary rows of this rank, n sequences of the block,
d hidden size.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.elementwise import cap_, exponentials_, row_max, tilt_
from pipeline.loss.exchange import Group, all_reduce
from pipeline.loss.sharding import Vocabulary

# fp16 cannot hold e next to its row sum; there dz is normalised, and kept this much larger against underflow.
FP16_GAIN = 64.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Rows:
    """The positions of a chunk. All [C]: target id, pooling weight, cross-entropy weight, sequence in the block."""

    targets: Tensor
    pooling: Tensor
    ce: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class Statistics:
    """Of a chunk's rows over the whole vocabulary, [C] each: largest logit, sums of e and of tilted, target logit."""

    largest: Tensor
    sum_e: Tensor
    sum_tilted: Tensor
    target: Tensor

    def cross_entropy(self) -> Tensor:
        """[C] -log p(target)."""
        return self.largest + self.sum_e.log() - self.target


@dataclass(frozen=True)
class Chunk:
    """A softmax in work: `e` is exp(z - max), `tilted` is exp((z - max) / temperature), the same tensor at 1.

    `cap_slope` [C, v] is the derivative of a soft cap. `owned` are the rows whose target is here, at `columns`.
    """

    rows: Rows
    hidden: Tensor
    e: Tensor
    tilted: Tensor
    cap_slope: Tensor | None
    owned: Tensor
    columns: Tensor
    statistics: Statistics


class ShardedSoftmax:
    """The vocabulary-sized work of the loss for one rank. Every collective of it is called here."""

    def __init__(self, vocabulary: Vocabulary, temperature: float, group: Group) -> None:
        self.vocabulary, self.temperature, self.group = vocabulary, temperature, group
        self._buffers: dict[str, Tensor] = {}

    def rows_that_fit(self, budget_mb: float) -> int:
        """Rows of each rank in one chunk: a chunk has R times as many, on a vocabulary R times smaller."""
        tensors = 1 + (self.temperature != 1) + (self.vocabulary.softcap is not None)
        row_bytes = self.vocabulary.size * self.vocabulary.head.weight.element_size() * tensors
        return max(1, int(budget_mb * 2**20 / row_bytes))

    def softmax(self, rows: Rows, hidden: Tensor, known: Statistics | None) -> Chunk:
        """Logits (product 1) and their exponentials; two small all-reduces unless the statistics are known."""
        vocabulary, dtype = self.vocabulary, accumulation_dtype(hidden.dtype)
        v = len(vocabulary.head.weight)
        z = self._buffer("z", len(hidden), v, hidden)
        if vocabulary.logit_scale != 1:
            hidden = hidden * vocabulary.logit_scale
        torch.mm(hidden, vocabulary.head.weight.T, out=z)
        if vocabulary.bias is not None:
            z.add_(vocabulary.bias)
        cap_slope = None
        if vocabulary.softcap is not None:
            cap_slope = cap_(z, vocabulary.softcap, self._buffer("slope", *z.shape, z))

        columns = rows.targets - vocabulary.head.start
        owned = ((columns >= 0) & (columns < v)).nonzero().squeeze(1)
        columns = columns[owned]
        largest = known.largest if known else all_reduce(row_max(z, dtype), self.group, dist.ReduceOp.MAX)
        target = torch.zeros_like(largest).index_copy_(0, owned, z[owned, columns].to(dtype))
        tilted = z
        if self.temperature != 1:
            tilted = self._buffer("tilted", *z.shape, z).copy_(z)
            sum_tilted = exponentials_(tilted, largest, self.temperature)
        sum_e = exponentials_(z, largest, 1.0)
        if known is None:
            sums = torch.stack([sum_e, target, sum_e if tilted is z else sum_tilted])
            sum_e, target, sum_tilted = all_reduce(sums, self.group)
            known = Statistics(largest, sum_e, sum_tilted, target)
        return Chunk(rows, hidden, z, tilted, cap_slope, owned, columns, known)

    def pool(self, chunk: Chunk, sequences: int) -> Tensor:
        """[n, v] sum over each sequence's rows of pooling weight * probability."""
        weights = chunk.e.new_zeros(sequences, len(chunk.e))
        scaled = chunk.rows.pooling / chunk.statistics.sum_tilted
        weights[chunk.rows.sequence, torch.arange(len(chunk.e), device=weights.device)] = scaled.to(weights.dtype)
        return (weights @ chunk.tilted).to(scaled.dtype)

    def summaries(self, pooled: Tensor) -> Tensor:
        """[n, v] mean probabilities to [n, d] soft-token summaries, over all ranks' vocabulary rows."""
        embedding = self.vocabulary.embedding.weight
        if self.vocabulary.weights is not None:
            pooled = pooled * self.vocabulary.weights
        return all_reduce((pooled.to(embedding.dtype) @ embedding).to(pooled.dtype), self.group)

    def directions(self, grad_u: Tensor) -> Tensor:
        """[n, d] gradient of the summaries to [n, v], that of each sequence's pooled probabilities."""
        embedding = self.vocabulary.embedding.weight
        directions = (grad_u.to(embedding.dtype) @ embedding.T).to(grad_u.dtype)
        return directions if self.vocabulary.weights is None else directions * self.vocabulary.weights

    def backward(self, chunk: Chunk, directions: Tensor | None, unit: float) -> Tensor:
        """dz in place of e, then products 2 and 3.

        Returns [C, d] this rank's part of dH, divided by `unit` (and times `gain` of its dtype); adds to the head's
        accumulator the exact unit * dz^T H.
        """
        vocabulary, rows, s = self.vocabulary, chunk.rows, chunk.statistics
        # dz = scale * (e' - target's share), where e' is e tilted by the alignment gradient.
        scale, at_target = (rows.ce if directions is None else 1.0) / s.sum_e, (s.target - s.largest).exp() - s.sum_e
        if directions is not None:
            at_target = self._tilt(chunk, directions, rows.ce * at_target)
        dz = chunk.e
        if dz.dtype == torch.float16:
            scale = scale * FP16_GAIN
            dz.mul_(scale[:, None])
            at_target, scale, unit = at_target * scale, torch.ones_like(scale), unit / FP16_GAIN
        dz[chunk.owned, chunk.columns] = at_target[chunk.owned].to(dz.dtype)
        if chunk.cap_slope is not None:
            dz.mul_(chunk.cap_slope)

        weighted = (chunk.hidden * scale[:, None]).to(dz.dtype)
        if vocabulary.head.grad is not None:
            add_product_(vocabulary.head.grad, dz.T, weighted, unit)
        if vocabulary.bias_grad is not None:
            vocabulary.bias_grad.add_((dz.T @ scale.to(dz.dtype)).to(vocabulary.bias_grad.dtype), alpha=unit)
        return (dz @ vocabulary.head.weight * (scale * vocabulary.logit_scale)[:, None]).to(dz.dtype)

    def _tilt(self, chunk: Chunk, directions: Tensor, at_target: Tensor) -> Tensor:
        """e <- ce * e + k * tilted * (direction - <p, direction>); returns the [C] values at the targets."""
        rows, s = chunk.rows, chunk.statistics
        inner = (chunk.tilted @ directions.T.to(chunk.tilted.dtype)).gather(1, rows.sequence[:, None]).squeeze(1)
        inner = all_reduce(inner.to(s.sum_e.dtype), self.group) / s.sum_tilted
        k = rows.pooling * s.sum_e / (s.sum_tilted * self.temperature)
        if chunk.tilted is chunk.e:
            tilt_(chunk.e, rows.ce - k * inner, k, directions, rows.sequence)
        else:
            tilt_(chunk.tilted, -k * inner, k, directions, rows.sequence)
            chunk.e.mul_(rows.ce[:, None]).add_(chunk.tilted)
        here = directions[rows.sequence[chunk.owned], chunk.columns]
        exact = ((s.target - s.largest) / self.temperature).exp()[chunk.owned]
        return at_target.index_add(0, chunk.owned, exact * k[chunk.owned] * (here - inner[chunk.owned]))

    def embedding_gradient(self, pooled: Tensor, grad_u: Tensor, unit: float) -> None:
        """dE += unit * pooled^T g: [S, v] and [S, d] of all sequences."""
        embedding = self.vocabulary.embedding
        if embedding.grad is not None:
            weights = self.vocabulary.weights
            add_product_(embedding.grad, (pooled if weights is None else pooled * weights).T, grad_u, unit)

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """[rows, columns], reused by every chunk of the call."""
        held = self._buffers.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._buffers[name] = like.new_empty(rows * columns)
        return held[: rows * columns].view(rows, columns)


def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha * a @ b, summed in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(total, a, b, alpha=alpha, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b, alpha=alpha)

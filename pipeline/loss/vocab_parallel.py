"""The SOLAR loss on vocabulary shards: three matrix products in all, alignment included, gradients taken in forward.

Every rank holds rows of head and embedding and sees all ranks' hidden states, chunk after chunk:

    gather H                       [C, d]   all-gather, one chunk ahead
    z = H W^T                      [C, v]   product 1
    softmax over these columns              in place
    log-sum-exp, target logits              all-gather [C, 3] -> cross entropy, p = scale * e
    pooled = pooling p             [n, v]   per sequence; p itself is never stored
    u = pooled E                   [n, d]   all-reduce: the summaries, so the distances and their gradient g [n, d]
    c = g E^T, <p_t, c>            [C]      all-reduce
    dz = p (1/N + w_t (c - <p_t, c>)) - onehot/N    in place of e
    dH = dz W                      [C, d]   product 2, reduce-scatter
    dW += dz^T H                   [v, d]   product 3

A unit that does not fit the buffer (schedule.py) recomputes its logits once its summaries are known.
Shape letters: T supervised positions of this rank, A of all ranks, C of a chunk, S sequences, n of a block,
v vocabulary rows of this rank, d hidden size, L languages.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.loss.alignment import RunningMeans, SummaryTable
from pipeline.loss.chunking import Block, Unit, schedule
from pipeline.loss.comm import Group, HiddenExchange, all_reduce, world_of
from pipeline.loss.kernels import Rows
from pipeline.loss.layout import Layout, gather_layout, upload
from pipeline.loss.loss_batch import LossBatch, LossNormalizers
from pipeline.loss.ring import GatheredSoftmax
from pipeline.loss.settings import LossSettings
from pipeline.loss.softmax import FP16_GAIN, Chunk, ShardedSoftmax, SoftGradient, accumulation_dtype, rows_that_fit
from pipeline.loss.traffic import Traffic
from pipeline.loss.vocabulary import Vocabulary


@dataclass
class SolarLoss:
    """The loss of one micro-step and its parts, all summed over ranks and equal on them.

    Attributes:
        loss: scalar, differentiable in `hidden`; its head and embedding gradients are in the shards already.
        ce_sum, distance_sum, cosine_sum: sums over positions and pairs; divide by the totals.
        language_ce, language_tokens: [L] cross entropy (without sequence weights) and positions by language.
    """

    loss: Tensor
    ce_sum: Tensor
    distance_sum: Tensor
    cosine_sum: Tensor
    language_ce: Tensor
    language_tokens: Tensor


def solar_loss(
    hidden: Tensor,
    loss_batch: LossBatch,
    vocabulary: Vocabulary,
    settings: LossSettings,
    alignment_weight: float,
    normalizers: LossNormalizers,
    languages: int,
    running_means: RunningMeans | None = None,
    group: Group = None,
) -> SolarLoss:
    """CE / totals.tokens + alignment_weight * alignment / totals.pairs over the micro-step of all ranks.

    Args:
        hidden: [T, d] final hidden states of this rank's supervised positions.
        supervised: best on the host, whatever the device of `hidden`: it is read there first.
        vocabulary: this rank's shards. Where their `grad` is given, the exact gradient of the loss (summed over
            ranks, no factor) is added to it during this call, unless autograd is off.
        totals: counts of the global batch. languages: L.
        centres: running means to subtract, updated here with this micro-step's summaries; None: no centring.
        group: the ranks that share the vocabulary; None for one process.

    The gradient of `hidden` is that of the global loss; a caller whose optimizer averages over ranks multiplies
    the loss by their number before backward.
    """
    grad = torch.zeros_like(hidden) if hidden.requires_grad and torch.is_grad_enabled() else None
    step = _Step(vocabulary, settings, normalizers, group)
    result = step.run(hidden.detach(), grad, loss_batch, alignment_weight, languages, running_means)
    if grad is not None:
        gain = FP16_GAIN if grad.dtype == torch.float16 else 1.0
        result.loss = _WithGradient.apply(hidden, result.loss, grad, step.unit / gain)
    return result


class _WithGradient(torch.autograd.Function):
    """Gives a loss its gradient unit * grad with respect to `hidden`, computed along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, grad: Tensor, unit: float) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.unit = unit
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        # The factor may be a loss scale beyond fp16's range: multiply in at least fp32.
        factor = (grad_outputs[0] * ctx.unit).to(accumulation_dtype(grad.dtype))
        return (grad * factor[None, None]).to(grad.dtype), None, None, None


class _Step:
    """One call of `solar_loss`. Gradients in work are in units of `unit`, so that fp16 does not underflow."""

    def __init__(
        self, vocabulary: Vocabulary, settings: LossSettings, normalizers: LossNormalizers, group: Group
    ) -> None:
        self.vocabulary, self.settings, self.normalizers, self.group = vocabulary, settings, normalizers, group
        self.unit = 1.0 / normalizers.tokens if normalizers.tokens else 1.0

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        grad: Tensor | None,
        loss_batch: LossBatch,
        weight: float,
        languages: int,
        running_means: RunningMeans | None,
    ) -> SolarLoss:
        """All blocks in order. `grad` [T, d], where given, receives the gradient of the hidden states."""
        settings, dtype, device = self.settings, accumulation_dtype(hidden.dtype), hidden.device
        layout = gather_layout(loss_batch, settings.pooling, dtype, device, self.group)
        buffer_rows = rows_that_fit(self.vocabulary, settings)
        blocks, order = schedule(layout.lengths, layout.pivots, buffer_rows, _unit(settings))
        layout = layout.ordered(blocks, order)
        table = SummaryTable(layout, blocks, hidden.shape[1], device, settings)
        shared = self._rows_are_shared(blocks, layout, table)
        make = ShardedSoftmax if shared else GatheredSoftmax
        softmax = make(self.vocabulary, settings.softmax_temperature, self.group)
        rows = _rows_of_pieces(layout, blocks, table, None if shared else world_of(self.group)[0], device)
        ce = hidden.new_zeros(len(layout.targets), dtype=dtype)
        factor = weight / self.normalizers.pairs / self.unit if self.normalizers.pairs and grad is not None else 0.0
        exchange = HiddenExchange(hidden, grad, self.group, shared)
        stream = exchange.stream([p for block in blocks for p in block.passes(backward=grad is not None)])

        for index, block in enumerate(blocks):
            pooled, chunks = self._forward(softmax, block, rows[index], stream, ce)
            soft = None
            if pooled is not None:
                grad_u = table.align(index, softmax.summaries(pooled), running_means, factor)
                soft = None if grad_u is None else SoftGradient(pooled[table.moved[index]], grad_u)
            if grad is None:
                continue
            directions = None
            if soft is not None and "probabilities" not in settings.detach:
                directions = softmax.from_owners(softmax.directions(soft.grad_u), table.moved_of_rank[index])
            if "embeddings" in settings.detach:
                soft = None
            for piece, chunk in zip(block.pieces, chunks, strict=True):
                if len(chunks) > 1:  # a later piece has overwritten its logits
                    chunk = softmax.softmax(chunk.rows, next(stream), chunk.statistics)
                exchange.reduce(piece, softmax.backward(chunk, directions, soft, self.unit))
                soft = None
        exchange.finish()
        softmax.finish(self.unit)
        if not shared:
            all_reduce(ce, self.group)
        if running_means is not None and self.normalizers.pairs:
            running_means.update(table.values, table.language, table.length > 0, settings.centring_momentum)
        return self._result(layout, table, ce, weight, languages)

    def _rows_are_shared(self, blocks: list[Block], layout: Layout, table: SummaryTable) -> bool:
        """Whether to divide the loss by columns; the same on every rank."""
        _, ranks = world_of(self.group)
        if self.settings.head != "auto" or ranks == 1:
            return self.settings.head != "gathered" or ranks == 1
        weight = self.vocabulary.head.weight
        pieces = [piece for block in blocks for piece in block.pieces]
        again = [piece for block in blocks if len(block.pieces) > 1 for piece in block.pieces]
        traffic = Traffic(
            ranks=ranks,
            vocab=self.vocabulary.size,
            hidden=weight.shape[1],
            element_size=weight.element_size(),
            positions=len(layout.targets),
            padded=sum(piece.longest for piece in pieces),
            pieces=len(pieces),
            recomputed=len(again),
            padded_recomputed=sum(piece.longest for piece in again),
            sequences=len(layout.length),
            moved=sum(map(sum, table.moved_of_rank)),
        )
        return traffic.vocab_parallel <= traffic.gathered

    def _forward(
        self,
        softmax: ShardedSoftmax,
        block: Block,
        rows: list[tuple[slice, Rows]],
        stream: Iterator[Tensor],
        ce: Tensor,
    ) -> tuple[Tensor | None, list[Chunk]]:
        """Softmax of each piece; [n, v] pooled probabilities of the block, if there are pairs. Fills `ce` [A]."""
        pooled, chunks = None, []
        for positions, rows_of_piece in rows:
            chunk = softmax.softmax(rows_of_piece, next(stream), None)
            ce[positions] = chunk.statistics.cross_entropy
            if self.normalizers.pairs:
                part = softmax.pool(chunk)
                pooled = part if pooled is None else pooled.add_(part)
            chunks.append(chunk if len(rows) == 1 else replace(chunk, hidden=chunk.hidden[:0]))
        return None if pooled is None else softmax.to_owners(pooled, block.members), chunks

    def _result(self, layout: Layout, table: SummaryTable, ce: Tensor, weight: float, languages: int) -> SolarLoss:
        everyone = torch.arange(languages, device=ce.device)[:, None]
        mine = everyone == upload([layout.language[layout.sequence]], ce.device)[0]
        ce_sum = (ce * upload([layout.ce], ce.device)[0]).sum()
        loss = ce_sum * self.unit
        if weight and self.normalizers.pairs:
            loss = loss + table.distance_sum * (weight / self.normalizers.pairs)
        return SolarLoss(
            loss=loss,
            ce_sum=ce_sum,
            distance_sum=table.distance_sum,
            cosine_sum=table.cosine_sum,
            language_ce=(mine * ce).sum(1),
            language_tokens=mine.sum(1),
        )


def _rows_of_pieces(
    layout: Layout, blocks: list[Block], table: SummaryTable, rank: int | None, device: torch.device
) -> list[list[tuple[slice, Rows]]]:
    """Of each block, its pieces' positions and rows; those of one rank where it is given, numbered from its own first.

    Everything goes to the device at once.
    """
    first, place = torch.zeros_like(layout.length), table.place.clone()
    sequences = []
    for block, moved in zip(blocks, table.moved_of_rank, strict=True):
        mine = block.sequences if rank is None else block.of_rank(rank)
        first[mine] = mine.start
        place[mine] = torch.where(place[mine] < 0, -1, place[mine] - (0 if rank is None else sum(moved[:rank])))
        sequences.append(mine)
    integers = [layout.targets, layout.sequence - first[layout.sequence], place[layout.sequence]]
    targets, sequence, moved_at = upload(integers, device)
    pooling, ce = upload([layout.pooling, layout.ce], device)
    moved_of = place.tolist()

    found: list[list[tuple[slice, Rows]]] = []
    for block, mine in zip(blocks, sequences, strict=True):
        found.append([])
        for piece in block.pieces:
            at, runs = piece.positions, piece.runs
            if rank is not None:
                at, runs = piece.of_rank(rank, mine.start - block.first)
            rows = Rows(targets[at], pooling[at], ce[at], sequence[at], moved_at[at], runs, moved_of[mine])
            found[-1].append((at, rows))
    return found


def _unit(settings: LossSettings) -> Unit:
    if settings.distance == "infonce":
        return "all"
    return "sequence" if "pivot" in settings.detach else "group"

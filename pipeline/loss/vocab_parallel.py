"""The SOLAR loss on vocabulary shards, with three matrix products in total. Gradients are computed in the forward pass.

With the vocabulary-parallel head, every rank holds rows of the LM head and the embedding and receives the hidden states
of all ranks, one subchunk at a time:

    gather H                       [C, d]   all-gather, one subchunk ahead
    z = H W^T                      [C, v]   product 1
    e = softmax(z) up to a factor  [C, v]   over the columns of this rank, in place of z
    log-sum-exp, target logits              all-gather [C, 3] -> cross entropy, p = scale * e
    q = softmax of k largest z     [C, k]   merged over ranks (see top_k.py)
    pooled = sum of w_t q_t        [n, v]   per sequence
    u = pooled E                   [n, d]   all-reduce: pooled representations -> distances, their gradient g [n, d]
    c = g E^T, <q_t, c>            [C]      all-reduce
    dz = (p - onehot)/N + a w_t q (c - <q_t, c>)  in place of e
    dH = dz W                      [C, d]   product 2, all-to-all and sum in fp32
    dW += dz^T H                   [v, d]   product 3, unless the head is frozen

With `pooling_tokens: hard`, q is the one-hot vector of the target, and the logits get no gradient of the alignment.
With `top_k: null`, q is p (or the softmax at the soft tokens' temperature) and is never stored. Pooling, <q_t, c> and
dz then take one pass over e each.

An alignment group that does not fit the buffer (see chunking.py) becomes a chunk of several subchunks, whose logits are
recomputed once the pooled representations are known. The ring head is in ring.py.

Shape letters: T target tokens of this rank, A of all ranks, C of a subchunk, S sequences, n of a chunk,
v vocabulary rows of this rank, d hidden size, L languages. N target tokens of the global batch, E embedding rows of
this rank, w_t pooling weight of token t, a weight of the alignment loss / number of pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .alignment import PooledRepresentations, RunningMeans
from .chunking import BufferSizes, Chunk
from .comm import Group, HiddenExchange, all_reduce, rank_and_size
from .head_choice import choose_head
from .head_time import BYTES_ONLY, ClusterSpeeds
from .indexing import upload
from .kernels import SubchunkTokens
from .layout import LayoutExchange
from .loss_batch import LossBatch, LossNormalizers
from .ring import RingSoftmax
from .settings import LossSettings
from .softmax import FP16_GAIN, ShardedSoftmax
from .softmax_state import SoftGradient, SoftmaxState, accumulation_dtype
from .subchunk_tokens import TokenTables, subchunk_tokens, token_tables
from .vocabulary import Vocabulary
from .with_gradient import WithGradient


@dataclass
class SolarLoss:
    """The loss of one micro-step and its parts, summed over all ranks and equal on all of them.

    Attributes:
        loss: scalar, differentiable with respect to `hidden`. The gradients of head and embedding have already been
            added to the accumulators of the shards.
        ce_sum, distance_sum, cosine_sum: sums over target tokens or pairs; divide them by the normalizers.
        language_ce: [L] cross entropy by language, summed with the `ce_weights` of the sequences.
        language_tokens: [L] sum of these weights over the target tokens of the language.
        kept_mass, soft_token_entropy: sums over the target tokens that take part in the alignment: probability that
            the k largest logits have in the softmax of all logits, and entropy in nats of the softmax over these k at
            the soft tokens' temperature. Both are 0 without top-k or with hard tokens.
        soft_token_count: number of these target tokens, 0 without top-k or with hard tokens. They have a pooling weight
            other than 0 and belong to a translation that has a pivot, or to such a pivot.
    """

    loss: Tensor
    ce_sum: Tensor
    distance_sum: Tensor
    cosine_sum: Tensor
    language_ce: Tensor
    language_tokens: Tensor
    kept_mass: Tensor
    soft_token_entropy: Tensor
    soft_token_count: Tensor


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
    speeds: ClusterSpeeds = BYTES_ONLY,
) -> SolarLoss:
    """Compute CE / normalizers.tokens + alignment_weight * alignment / normalizers.pairs over all ranks.

    With `pooling_tokens: hidden_states`, the second term is left to `add_hidden_state_alignment`.

    Collective: all ranks must call it.

    The gradient of `hidden` is that of the global loss. If the optimizer averages gradients over ranks, multiply the
    loss by the number of ranks before backward.

    Args:
        hidden: [T, d] final hidden states that predict this rank's target tokens.
        loss_batch: layout of the target tokens. It should be on the host, because it is first read there.
        vocabulary: shards of this rank. If a shard has a `grad`, the gradient of the loss (summed over ranks, without
            a factor) is added to it during this call, unless grad mode is disabled.
        settings: settings of the loss.
        alignment_weight: weight of the alignment loss at this step.
        normalizers: counts of the global batch.
        languages: L.
        running_means: means to subtract from the pooled representations. They are updated with this micro-step,
            unless grad mode is disabled. None to disable centering.
        group: process group that shards the vocabulary. None is a single process, not the default group.
        speeds: number of ranks of the group that share a node, which reduces the bytes between nodes, and the speeds by
            which `head: auto` chooses.

    Raises:
        ValueError: pooling is `weights` and `loss_batch` has no token weights.
    """
    if settings.soft_token_embeddings == "output":
        vocabulary = replace(vocabulary, embedding=vocabulary.head)
    is_trained = hidden.requires_grad or any(s.grad is not None for s in (vocabulary.head, vocabulary.embedding))
    grad = torch.zeros_like(hidden) if is_trained and torch.is_grad_enabled() else None
    step = _Step(vocabulary, settings, normalizers, group, speeds)
    with torch.autocast(hidden.device.type, enabled=False):  # it would compute distances in half precision
        result = step.run(hidden.detach(), grad, loss_batch, alignment_weight, languages, running_means)
    if grad is not None and hidden.requires_grad:
        gain = FP16_GAIN if grad.dtype == torch.float16 else 1.0
        result.loss = WithGradient.apply(hidden, result.loss, grad, step.grad_scale / gain)
    return result


class _Step:
    """State of one `solar_loss` call.

    Attributes:
        grad_scale: 1 / normalizers.tokens. The gradient of the logits is divided by it to prevent underflow in fp16.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: LossSettings,
        normalizers: LossNormalizers,
        group: Group,
        speeds: ClusterSpeeds,
    ) -> None:
        self.speeds = speeds
        self.sizes = BufferSizes.of(vocabulary, rank_and_size(group)[1])
        self.vocabulary, self.settings, self.normalizers, self.group = vocabulary, settings, normalizers, group
        self.grad_scale = 1.0 / normalizers.tokens if normalizers.tokens else 1.0
        # Without pairs, nothing is pooled. Hard tokens and hidden states of a layer do not depend on the logits.
        self.pools = bool(normalizers.pairs) and settings.pools_vocabulary
        soft = bool(normalizers.pairs) and settings.pooling_tokens == "soft"
        self.temperature = settings.softmax_temperature if soft else 1.0
        self.top_k = settings.top_k if soft else None
        self.hard = settings.pooling_tokens == "hard"

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        grad: Tensor | None,
        loss_batch: LossBatch,
        alignment_weight: float,
        languages: int,
        running_means: RunningMeans | None,
    ) -> SolarLoss:
        """Process all chunks in order.

        `grad` [T, d], if given, receives the gradient of the hidden states. The other arguments are those of
        `solar_loss`.
        """
        settings, dtype, device = self.settings, accumulation_dtype(hidden.dtype), hidden.device
        layout = loss_batch.layout
        if layout is None:
            (layout,), _ = LayoutExchange(self.group).exchange([loss_batch], settings.pooling, device)
        chosen = choose_head(layout, self.sizes, settings, self.vocabulary.size, self.top_k, self.speeds)
        chunks, vocab_parallel = chosen.chunks, chosen.vocab_parallel
        layout = layout.in_order(chosen.order)
        table = PooledRepresentations(layout, chunks, hidden.shape[1], dtype, settings)
        pairs = self.normalizers.pairs
        factor = alignment_weight / pairs / self.grad_scale if pairs and grad is not None else 0.0
        softmax = self._softmax(vocab_parallel, factor)
        own_rank = None if vocab_parallel else rank_and_size(self.group)[0]
        tables = token_tables(layout, chunks, table, settings.pooling, dtype)
        tokens = subchunk_tokens(tables, chunks, table, own_rank)
        softmax.reserve(subchunk for chunk in tokens for _, subchunk in chunk)
        rows = hidden.new_zeros(1 if self.top_k is None else 3, len(tables.targets), dtype=dtype)
        exchange = HiddenExchange(hidden, grad, self.group, vocab_parallel, self.speeds.ranks_per_node)
        stream = exchange.stream([s for chunk in chunks for s in chunk.passes(backward=grad is not None)])

        for index, chunk in enumerate(chunks):
            pooled, states = self._forward(softmax, chunk, tokens[index], stream, rows)
            soft = None
            if pooled is not None:
                table.sum_parts(index, pooled)
                u = softmax.pooled_representations(pooled)
                grad_u = table.align(index, u, running_means, 1.0 if factor else 0.0)
                if grad_u is not None:
                    grad_u_of_parts = grad_u[table.of_part[index]] if table.of_part else grad_u
                    with_grad = pooled[table.requires_grad[index]]
                    soft = SoftGradient(with_grad, grad_u, grad_u_of_parts, softmax.used_columns(with_grad))
            if grad is not None:
                self._backward(softmax, chunk, states, soft, table.requires_grad_of_rank[index], stream, exchange)
        exchange.finish()
        softmax.finish(self.grad_scale)
        if not vocab_parallel:
            all_reduce(rows, self.group)
        if running_means is not None and self.pools and grad is not None:
            running_means.update(table.values, table.language, table.counted, settings.centring_momentum)
        return self._result(tables, table, rows, alignment_weight, languages)

    def _softmax(self, vocab_parallel: bool, factor: float) -> ShardedSoftmax:
        """Create the implementation of the head `vocab_parallel`, or else of `gathered`."""
        arguments = self.vocabulary, self.temperature, self.top_k, self.group, self.hard, factor
        if vocab_parallel:
            return ShardedSoftmax(*arguments)
        return RingSoftmax(*arguments, self.sizes.block_rows(self.settings))

    def _forward(
        self,
        softmax: ShardedSoftmax,
        chunk: Chunk,
        tokens: list[tuple[slice, SubchunkTokens]],
        stream: Iterator[Tensor],
        rows: Tensor,
    ) -> tuple[Tensor | None, list[SoftmaxState]]:
        """Compute the softmax of each subchunk.

        Fills `rows` [1 or 3, A]: cross entropy and, with top-k, kept mass and entropy of the soft tokens.

        Returns:
            (pooled, states). `pooled`: [n, v] pooled probabilities of the chunk, or None if none are pooled.
            `states`: the softmax state of each subchunk, without hidden states and mixture if there are several.
        """
        pooled, states = None, []
        for in_layout, tokens_of_subchunk in tokens:
            state = softmax.softmax(tokens_of_subchunk, next(stream), None)
            rows[:, in_layout] = state.statistics.stacked()
            if self.pools:
                part = softmax.pool(state)
                pooled = part if pooled is None else pooled.add_(part)
            states.append(state if len(tokens) == 1 else replace(state, hidden=state.hidden[:0], mixture=None))
        return None if pooled is None else softmax.to_column_owners(pooled, chunk.sequence_bounds.diff()), states

    def _backward(
        self,
        softmax: ShardedSoftmax,
        chunk: Chunk,
        states: list[SoftmaxState],
        soft: SoftGradient | None,
        requires_grad_of_rank: Tensor,
        stream: Iterator[Tensor],
        exchange: HiddenExchange,
    ) -> None:
        """Compute all gradients of a chunk. `soft` is None if the chunk has no pairs."""
        grad_probs = None
        if soft is not None and not self.hard and "probabilities" not in self.settings.detach:
            own_columns = softmax.grad_probs(soft.grad_u_of_parts, soft.columns)
            grad_probs = softmax.from_column_owners(own_columns, requires_grad_of_rank)
        if "embeddings" in self.settings.detach or self.vocabulary.embedding.grad is None:
            soft = None
        for subchunk, state in zip(chunk.subchunks, states, strict=True):
            if len(states) > 1:  # a later subchunk has overwritten the logits
                state = softmax.softmax(state.tokens, next(stream), state.statistics)
            exchange.reduce(subchunk, softmax.backward(state, grad_probs, soft, self.grad_scale))
            soft = None

    def _result(
        self, tables: TokenTables, table: PooledRepresentations, rows: Tensor, alignment_weight: float, languages: int
    ) -> SolarLoss:
        """Build the result from the values of all target tokens (`rows`, see `_forward`) and the sums over pairs."""
        ce, device = rows[0], rows.device
        weighted = ce * tables.ce_weights
        ce_sum = weighted.sum()
        loss = ce_sum * self.grad_scale
        if alignment_weight and self.normalizers.pairs:
            loss = loss + table.distance_sum * (alignment_weight / self.normalizers.pairs)
        (aligned,) = upload([table.aligned & (self.top_k is not None)], device)
        aligned = aligned[tables.sequence] & (tables.pooling_weights > 0)
        kept_mass, entropy = (rows[1:] * aligned).sum(1) if len(rows) > 1 else ce.new_zeros(2)
        by_language = tables.sum_by_language([weighted, tables.ce_weights], table.language, languages)
        return SolarLoss(
            loss=loss,
            ce_sum=ce_sum,
            distance_sum=table.distance_sum,
            cosine_sum=table.cosine_sum,
            language_ce=by_language[0],
            language_tokens=by_language[1],
            kept_mass=kept_mass,
            soft_token_entropy=entropy,
            soft_token_count=aligned.sum(),
        )

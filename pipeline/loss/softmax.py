"""Operations on the logits of one subchunk: softmax, pooling, and the matrix products of the backward pass.

Shape letters: C rows (target tokens) of the subchunk, v vocabulary rows of this rank (columns of the logits),
n sequences of the chunk, m of them whose pooled representations require a gradient, R ranks, d hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .comm import Group, all_reduce
from .embedding_products import add_gradient_, times_embedding, times_embedding_transposed, used_columns
from .kernels import (
    SubchunkTokens,
    add_product_,
    inner_products,
    pool,
    row_stride,
    softcap_,
    softmax_,
    softmax_backward_,
)
from .softmax_state import RowStatistics, SoftGradient, SoftmaxState
from .top_k import TopKMixture, grad_logits, one_hot, pool_top_k, softmax_with_largest_, top_k_mixture
from .vocabulary import Vocabulary

# In fp16, dz is normalized, because the range is too small for e and its row sum. This factor prevents underflow.
FP16_GAIN = 64.0


class ShardedSoftmax:
    """Softmax, pooling and products on one rank with the vocabulary-parallel head: all rows, this rank's columns.

    Args:
        vocabulary: shards of this rank.
        temperature: divisor of the logits in the soft tokens' softmax.
        top_k: number of largest logits in the soft tokens' softmax, or None for all.
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.
        hard: whether to pool the target tokens in place of soft tokens. `top_k` is then None.
        alignment_factor: weight of the alignment loss / number of pairs / grad_scale. It multiplies dz and the gradient
            of the embedding, not that of the pooled representations, which fp16 could not hold with it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        temperature: float,
        top_k: int | None,
        group: Group,
        hard: bool,
        alignment_factor: float,
    ) -> None:
        self.vocabulary, self.temperature, self.group = vocabulary, temperature, group
        self._alignment_factor = alignment_factor
        self.top_k, self.hard = None if top_k is None else min(top_k, vocabulary.size), hard
        self._is_sparse = hard or top_k is not None  # few pooled probabilities are not 0
        # First column and number of columns of the logits on this rank, and the ranks that hold the other columns.
        self.start, self.num_columns, self.row_group = vocabulary.head.start, len(vocabulary.head.weight), group
        self.buffer_columns = self.num_columns
        self.bias, self.bias_grad = vocabulary.bias, vocabulary.bias_grad
        # Product 3 includes the gradient of a tied embedding, except in fp16: pooled * factor * FP16_GAIN may overflow.
        head, is_fp16 = vocabulary.head, vocabulary.head.weight.dtype == torch.float16
        self._joint_gradient = vocabulary.embedding is head and head.grad is not None and not is_fp16
        self._soft: list[SoftGradient] = []
        self._buffers: dict[str, Tensor] = {}
        self._buffer_rows = 0

    def reserve(self, subchunks: Iterable[SubchunkTokens]) -> None:
        """Make all buffers large enough for these subchunks. A larger one would be allocated beside the earlier one."""
        rows = (len(s.targets) + self._joint_gradient * len(s.grad_index_of_sequence) for s in subchunks)
        self._buffer_rows = max(rows, default=0)

    def softmax(self, tokens: SubchunkTokens, hidden: Tensor, statistics: RowStatistics | None) -> SoftmaxState:
        """Compute the logits (product 1 of `vocab_parallel`) and their softmax.

        Args:
            tokens: the target tokens of the subchunk.
            hidden: [C, d] hidden states of the target tokens.
            statistics: row statistics of an earlier pass over the subchunk. If None, compute them with one all-gather.
        """
        vocabulary = self.vocabulary
        extra_rows = len(tokens.grad_index_of_sequence) if self._joint_gradient else 0
        e_buffer = self._buffer("z", len(hidden) + extra_rows, hidden)
        z = e_buffer[: len(hidden)]
        hidden = hidden if vocabulary.logit_scale == 1 else hidden * vocabulary.logit_scale
        self._logits(hidden, z)
        if self.bias is not None:
            z.add_(self.bias)
        cap_derivative = None
        if vocabulary.softcap is not None:
            cap_derivative = softcap_(z, vocabulary.softcap, self._buffer("cap_derivative", len(z), z))

        columns, local = self._target_columns(tokens)
        dtype = tokens.ce_weights.dtype
        target_logit = torch.where(local, z.gather(1, columns).squeeze(1).to(dtype), 0) if z.numel() else local * 0.0
        tempered, tempered_sums, largest, columns_of_largest = z, None, None, None
        if self.top_k is not None:
            sums, largest, columns_of_largest = softmax_with_largest_(z, self.top_k)
        else:
            if self.temperature != 1:
                tempered = self._buffer("tempered", len(z), z).copy_(z)
                tempered_sums = softmax_(tempered, self.temperature)
            sums = softmax_(z, 1.0)
        if statistics is None:
            top_k = None if self.top_k is None or largest is None else (largest, self.top_k)
            statistics = RowStatistics.over_ranks(
                target_logit, sums, tempered_sums or sums, top_k, self.temperature, self.row_group
            )
        mixture = one_hot(columns, local, dtype, self.num_columns) if self.hard else None
        if largest is not None and columns_of_largest is not None and statistics.top_k is not None:
            mixture = top_k_mixture(largest, columns_of_largest, statistics.top_k, self.temperature)
        return SoftmaxState(tokens, columns, local, hidden, z, e_buffer, tempered, cap_derivative, statistics, mixture)

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        """Fill `out` [C, v] with hidden W^T."""
        torch.mm(hidden, self.vocabulary.head.weight.T, out=out)

    def pool(self, state: SoftmaxState) -> Tensor:
        """Compute [n, v]: the sum of pooling weight * probability over the rows of each sequence."""
        if state.mixture is not None:
            return pool_top_k(state.mixture, state.tokens, self.num_columns)
        weights = state.tokens.pooling_weights * state.statistics.tempered_scale
        return pool(state.tempered, weights, state.tokens)

    def used_columns(self, pooled: Tensor) -> Tensor | None:
        """Return the columns in which one of the [m, v] pooled probabilities is not 0, or None to use all."""
        return used_columns(pooled) if self._is_sparse else None

    def pooled_representations(self, pooled: Tensor) -> Tensor:
        """Compute the [n, d] pooled representations from the [n, v] pooled probabilities, summed over all ranks."""
        u = times_embedding(self._apply_weights(pooled), self.vocabulary.embedding.weight, self._is_sparse)
        return all_reduce(u.to(pooled.dtype), self.group)

    def grad_probs(self, grad_u: Tensor, columns: Tensor | None) -> Tensor:
        """Backpropagate the [m, d] gradient of the pooled representations to the pooled probabilities, [m, v].

        The result has the dtype of E. Outside `columns` it is 0, because it is not needed there.
        """
        embedding = self.vocabulary.embedding.weight
        grad_probs = times_embedding_transposed(grad_u.to(embedding.dtype), embedding, columns)
        return grad_probs if self.vocabulary.weights is None else grad_probs.mul_(self.vocabulary.weights)

    def backward(
        self, state: SoftmaxState, grad_probs: Tensor | None, soft: SoftGradient | None, grad_scale: float
    ) -> Tensor:
        """Overwrite e with dz, then compute products 2 and 3.

        Adds grad_scale * dz^T H to the gradient accumulator of the head.

        Args:
            state: softmax of the subchunk; overwritten.
            grad_probs: [m, v] gradient of the pooled probabilities, or None.
            soft: factors of the embedding's gradient, or None. With few used columns it is added at once. Otherwise it
                is added with product 3 if head and embedding are tied, and in `finish` if not.
            grad_scale: scale of the gradients, see `vocab_parallel`.

        Returns:
            [C, d] contribution of this rank to dH / grad_scale, multiplied by FP16_GAIN in fp16.
        """
        tokens, s = state.tokens, state.statistics
        # dz = scale * (e' - 1 / scale at the target), where e' is ce_weights * e plus the alignment gradient.
        scale, at_target = s.scale * tokens.ce_weights, s.target - 1 / s.scale
        if tokens.any_without_ce and grad_probs is not None and state.mixture is not None:
            # The top-k alignment gradient is added to e divided by the factor of its row, which must not be 0.
            without_ce = tokens.ce_weights == 0
            state.e.masked_fill_(without_ce[:, None], 0)
            scale, at_target = torch.where(without_ce, s.scale, scale), torch.where(without_ce, 0, at_target)
        if grad_probs is not None and state.mixture is None:
            with_grad = tokens.grad_index >= 0
            scale = torch.where(with_grad, s.scale, scale)
            aligned = self._add_alignment(state, grad_probs, tokens.ce_weights * at_target)
            at_target = torch.where(with_grad, aligned, at_target)
        dz = state.e
        gain = FP16_GAIN if dz.dtype == torch.float16 else 1.0
        if dz.dtype == torch.float16:
            scale = scale * FP16_GAIN
            dz.mul_(scale[:, None])
            at_target, scale = at_target * scale, torch.ones_like(scale)
        columns, local = state.target_columns, state.target_is_local
        if dz.numel():
            dz.scatter_(1, columns, torch.where(local[:, None], at_target[:, None].to(dz.dtype), dz.gather(1, columns)))
        if grad_probs is not None and state.mixture is not None:
            self._add_top_k_alignment(
                state, state.mixture, grad_probs, self._alignment_factor * gain / scale, at_target
            )
        if state.cap_derivative is not None:
            dz.mul_(state.cap_derivative)

        if self.bias_grad is not None:
            self.bias_grad.add_((dz.T @ scale.to(dz.dtype)).to(self.bias_grad.dtype), alpha=grad_scale / gain)
        total = self.vocabulary.embedding.grad
        if soft is not None and soft.columns is not None and total is not None:
            factor = grad_scale * self._alignment_factor
            add_gradient_(total, self._apply_weights(soft.pooled), soft.grad_u, soft.columns, factor)
            soft = None
        extra_rows = len(soft.pooled) if soft is not None and self._joint_gradient else 0
        weighted = state.hidden.new_empty(len(state.hidden) + extra_rows, state.hidden.shape[1])
        # With an output in the dtype of the factors, a GPU computes in fp32 without an fp32 temporary.
        torch.mul(state.hidden, scale[:, None], out=weighted[: len(state.hidden)])
        product = self._products(state, weighted, soft, grad_scale / gain)
        return product.mul_((scale * self.vocabulary.logit_scale)[:, None]).to(dz.dtype)

    def _add_alignment(self, state: SoftmaxState, grad_probs: Tensor, at_target: Tensor) -> Tensor:
        """Set e <- ce_weights * e + k * tempered * (grad_probs - <p, grad_probs>) in rows that require a gradient.

        Returns:
            [C] `at_target` (ce_weights * e at the target) plus the alignment gradient at the target.
        """
        tokens, s = state.tokens, state.statistics
        inner = all_reduce(inner_products(state.tempered, grad_probs, tokens) * s.tempered_scale, self.row_group)
        slope = tokens.pooling_weights * self._alignment_factor / self.temperature
        k = slope * s.tempered_scale / s.scale
        softmax_backward_(state.e, state.tempered, tokens.ce_weights, k, inner, grad_probs, tokens)
        if grad_probs.numel() == 0:
            return at_target
        grad_at_target = grad_probs[tokens.grad_index.clamp_min(0), state.target_columns.squeeze(1)]
        return at_target + k * s.tempered_target * (grad_at_target - inner)

    def _add_top_k_alignment(
        self, state: SoftmaxState, mixture: TopKMixture, grad_probs: Tensor, factor: Tensor, at_target: Tensor
    ) -> None:
        """Add factor * the alignment gradient at the columns of `mixture` to e, which holds dz up to a factor per row.

        Args:
            state: softmax of the subchunk.
            mixture: this rank's part of the probabilities of the soft tokens.
            grad_probs: [m, v] gradient of the pooled probabilities.
            factor: [C] factor of the gradient.
            at_target: [C] value of e at the target before rounding.
        """
        grad = grad_logits(mixture, grad_probs, state.tokens, factor / self.temperature, self.row_group)
        at_columns = state.e.gather(1, mixture.columns).to(grad.dtype)
        is_target = (mixture.columns == state.target_columns) & state.target_is_local[:, None]
        at_columns = torch.where(is_target, at_target[:, None], at_columns)
        state.e.scatter_(1, mixture.columns, (at_columns + grad).to(state.e.dtype))

    def _products(self, state: SoftmaxState, weighted: Tensor, soft: SoftGradient | None, grad_scale: float) -> Tensor:
        """Add grad_scale * dz^T weighted (and `soft`) to the head's gradient. Return dz W. `state.e` holds dz.

        `weighted` has free rows for the gradient of `soft` if this is part of the product.
        """
        head, dz, rows = self.vocabulary.head, state.e, len(state.e)
        if soft is not None and not self._joint_gradient:
            self._soft.append(soft)
        elif soft is not None:
            dz = state.e_buffer[: len(weighted)]
            torch.mul(self._apply_weights(soft.pooled), self._alignment_factor, out=dz[rows:])
            weighted[rows:] = soft.grad_u
        if head.grad is not None:
            add_product_(head.grad, dz.T, weighted, grad_scale)
        return state.e @ head.weight

    def to_column_owners(self, pooled: Tensor, sequence_counts: Tensor) -> Tensor:
        """Return the [n, v] pooled probabilities of the sequences of all ranks, for the embedding rows of this rank.

        Args:
            pooled: result of `pool`.
            sequence_counts: [R] number of sequences of each rank, on the host.
        """
        return pooled

    def from_column_owners(self, grad_probs: Tensor, requires_grad_of_rank: Tensor) -> Tensor:
        """Return the [m, v] grad_probs for the rows and columns of the logits on this rank.

        Args:
            grad_probs: result of `grad_probs`.
            requires_grad_of_rank: [R] number of sequences of each rank that require a gradient, on the host.
        """
        return grad_probs

    def finish(self, grad_scale: float) -> None:
        """Add the alignment gradient of all chunks to the embedding's gradient, unless `backward` has done so."""
        if self._soft and self.vocabulary.embedding.grad is not None:
            pooled = self._apply_weights(torch.cat([soft.pooled for soft in self._soft]))
            grad_u = torch.cat([soft.grad_u for soft in self._soft])
            add_product_(self.vocabulary.embedding.grad, pooled.T, grad_u, grad_scale * self._alignment_factor)

    def _apply_weights(self, pooled: Tensor) -> Tensor:
        weights = self.vocabulary.weights
        return pooled if weights is None else pooled * weights.to(pooled.dtype)

    def _target_columns(self, tokens: SubchunkTokens) -> tuple[Tensor, Tensor]:
        """Return [C, 1] local column of each target (any valid column if not local), and [C] whether it is local."""
        columns = tokens.targets - self.start
        return columns.clamp(0, max(0, self.num_columns - 1))[:, None], (columns >= 0) & (columns < self.num_columns)

    def _buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """Return a [rows, v] buffer with aligned rows, which is reused for all subchunks of the call."""
        stride = row_stride(self.buffer_columns, like.is_cuda)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < rows:
            buffer = self._buffers[name] = like.new_empty(max(rows, self._buffer_rows), stride)
        return buffer[:rows, : self.num_columns]

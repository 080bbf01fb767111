"""Operations on the logits of one subchunk: softmax, pooling, and the matrix products of the backward pass.

Shape letters: C rows (target tokens) of the subchunk, v vocabulary rows of this rank (columns of the logits),
n sequences of the chunk, m of them whose pooled representations require a gradient, R ranks, d hidden size.
"""

import torch
from torch import Tensor

from pipeline.loss.comm import Group, all_gather, all_reduce
from pipeline.loss.kernels import (
    SubchunkTokens,
    inner_products,
    pool,
    softcap_,
    softmax_,
    softmax_backward_,
    times_embedding,
)
from pipeline.loss.settings import LossSettings
from pipeline.loss.softmax_state import RowStatistics, SoftGradient, SoftmaxState
from pipeline.loss.vocabulary import Vocabulary

# In fp16, dz is normalized, because the range is too small for e and its row sum. This factor prevents underflow.
FP16_GAIN = 64.0
# Lower bound of the log of the probability of a row on one rank. Below it, dz at the target would overflow fp32.
SMALLEST_LOG_SCALE = -60.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for half precisions, or else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def rows_that_fit(vocabulary: Vocabulary, settings: LossSettings) -> int:
    """Return the number of target tokens per rank that fit in one subchunk.

    With the vocabulary-parallel head, a subchunk has R times as many rows, but R times fewer columns.
    """
    weight = vocabulary.head.weight
    row_bytes = vocabulary.size * weight.element_size()
    return rows_in_budget(settings, row_bytes, vocabulary.softcap is not None, weight.is_cuda)


def rows_in_budget(settings: LossSettings, row_bytes: int, softcap: bool, gpu: bool) -> int:
    """Return the number of target tokens per rank that fit in one subchunk, computed from sizes only.

    Args:
        settings: determine the memory budget and whether a second softmax is needed.
        row_bytes: bytes of one row of logits over the whole vocabulary.
        softcap: whether the logits are soft-capped.
        gpu: whether to use the default budget for a GPU.
    """
    tensors = 1 + (settings.softmax_temperature != 1) + softcap
    budget_mb = settings.memory_budget_mb or (2048 if gpu else 64)
    return max(1, int(budget_mb * 2**20 / (row_bytes * tensors)))


class ShardedSoftmax:
    """Softmax, pooling and products on one rank with the vocabulary-parallel head: all rows, this rank's columns.

    Args:
        vocabulary: shards of this rank.
        temperature: divisor of the logits in the soft tokens' softmax.
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.
    """

    def __init__(self, vocabulary: Vocabulary, temperature: float, group: Group) -> None:
        self.vocabulary, self.temperature, self.group = vocabulary, temperature, group
        # The columns of the logits on this rank, and the group of ranks that hold the other columns.
        self.start, self.columns, self.row_group = vocabulary.head.start, len(vocabulary.head.weight), group
        self.bias, self.bias_grad = vocabulary.bias, vocabulary.bias_grad
        self._tied = vocabulary.embedding is vocabulary.head
        self._soft: list[SoftGradient] = []
        self._buffers: dict[str, Tensor] = {}

    def softmax(self, tokens: SubchunkTokens, hidden: Tensor, statistics: RowStatistics | None) -> SoftmaxState:
        """Compute the logits (product 1) and their softmax.

        Args:
            tokens: the target tokens of the subchunk.
            hidden: [C, d] hidden states of the target tokens.
            statistics: row statistics of an earlier pass over the subchunk. If None, compute them with one all-gather.
        """
        vocabulary = self.vocabulary
        extra_rows = len(tokens.grad_index_of_sequence) if self._tied else 0
        e_buffer = self._buffer("z", len(hidden) + extra_rows, hidden)
        z = e_buffer[: len(hidden)]
        if vocabulary.logit_scale != 1:
            hidden = hidden * vocabulary.logit_scale
        self._logits(hidden, z)
        if self.bias is not None:
            z.add_(self.bias)
        cap_derivative = None
        if vocabulary.softcap is not None:
            cap_derivative = softcap_(z, vocabulary.softcap, self._buffer("cap_derivative", len(z), z))

        columns, local = self._target_columns(tokens)
        dtype = tokens.ce_weights.dtype
        target = torch.where(local, z.gather(1, columns).squeeze(1).to(dtype), 0) if z.numel() else local * 0.0
        tempered = z
        if self.temperature != 1:
            tempered = self._buffer("tempered", len(z), z).copy_(z)
        sums = softmax_(z, 1.0)
        tempered_sums = softmax_(tempered, self.temperature) if tempered is not z else sums
        if statistics is None:
            statistics = self._statistics(target, *sums, *tempered_sums)
        return SoftmaxState(tokens, hidden, z, e_buffer, tempered, cap_derivative, statistics)

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        """Fill `out` [C, v] with hidden W^T."""
        torch.mm(hidden, self.vocabulary.head.weight.T, out=out)

    def _statistics(
        self, target: Tensor, log_sum: Tensor, total: Tensor, tempered_log_sum: Tensor, tempered_total: Tensor
    ) -> RowStatistics:
        """Combine the statistics of all ranks. All arguments are [C]. `target` is the target logit, 0 if not local."""
        ranks = all_gather(torch.stack([log_sum, tempered_log_sum, target]), self.row_group)
        global_log_sum, tempered_global_log_sum = ranks[:, :2].logsumexp(0)
        return RowStatistics(
            cross_entropy=global_log_sum - ranks[:, 2].sum(0),
            scale=(log_sum - global_log_sum).clamp_min(SMALLEST_LOG_SCALE).exp() / total,
            tempered_scale=(tempered_log_sum - tempered_global_log_sum).exp() / tempered_total,
            target=(target - log_sum).exp() * total,
            tempered_target=(target / self.temperature - tempered_log_sum).exp() * tempered_total,
        )

    def pool(self, state: SoftmaxState) -> Tensor:
        """Compute [n, v]: the sum of pooling weight * probability over the rows of each sequence."""
        weights = state.tokens.pooling_weights * state.statistics.tempered_scale
        return pool(state.tempered, weights, state.tokens)

    def pooled_representations(self, pooled: Tensor) -> Tensor:
        """Compute the [n, d] pooled representations from the [n, v] pooled probabilities, summed over all ranks."""
        embedding = self.vocabulary.embedding.weight
        return all_reduce(
            times_embedding(self._apply_weights(pooled).to(embedding.dtype), embedding).to(pooled.dtype), self.group
        )

    def grad_probs(self, grad_u: Tensor) -> Tensor:
        """Backpropagate the [m, d] gradient of the pooled representations to the pooled probabilities, [m, v].

        The result has the dtype of E.
        """
        embedding = self.vocabulary.embedding.weight
        # In this order a CPU reads E only once, at memory bandwidth.
        grad_probs = (embedding @ grad_u.to(embedding.dtype).T).T.contiguous()
        weights = self.vocabulary.weights
        return grad_probs if weights is None else (grad_probs * weights).to(grad_probs.dtype)

    def backward(
        self, state: SoftmaxState, grad_probs: Tensor | None, soft: SoftGradient | None, grad_scale: float
    ) -> Tensor:
        """Overwrite e with dz, then compute products 2 and 3.

        Adds grad_scale * dz^T H to the gradient accumulator of the head.

        Args:
            state: softmax of the subchunk; overwritten.
            grad_probs: [m, v] gradient of the pooled probabilities, or None.
            soft: factors of the embedding's gradient, or None. If head and embedding are tied, the gradient is added
                with product 3, otherwise in `finish`.
            grad_scale: scale of the gradients, see `vocab_parallel`.

        Returns:
            [C, d] contribution of this rank to dH / grad_scale, multiplied by FP16_GAIN in fp16.
        """
        tokens, s = state.tokens, state.statistics
        # dz = scale * (e' - 1 / scale at the target), where e' is ce_weights * e plus the alignment gradient.
        scale, at_target = s.scale * tokens.ce_weights, s.target - 1 / s.scale
        if grad_probs is not None:
            with_grad = tokens.grad_index >= 0
            scale = torch.where(with_grad, s.scale, scale)
            aligned = self._add_alignment(state, grad_probs, tokens.ce_weights * at_target)
            at_target = torch.where(with_grad, aligned, at_target)
        dz = state.e
        if dz.dtype == torch.float16:
            scale = scale * FP16_GAIN
            dz.mul_(scale[:, None])
            at_target, scale = at_target * scale, torch.ones_like(scale)
        columns, local = self._target_columns(tokens)
        if dz.numel():
            dz.scatter_(1, columns, torch.where(local[:, None], at_target[:, None].to(dz.dtype), dz.gather(1, columns)))
        if state.cap_derivative is not None:
            dz.mul_(state.cap_derivative)

        gain = FP16_GAIN if dz.dtype == torch.float16 else 1.0
        if self.bias_grad is not None:
            self.bias_grad.add_((dz.T @ scale.to(dz.dtype)).to(self.bias_grad.dtype), alpha=grad_scale / gain)
        weighted = (state.hidden * scale[:, None]).to(dz.dtype)
        product = self._products(state, weighted, soft, gain, grad_scale / gain)
        return (product * (scale * self.vocabulary.logit_scale)[:, None]).to(dz.dtype)

    def _add_alignment(self, state: SoftmaxState, grad_probs: Tensor, at_target: Tensor) -> Tensor:
        """Set e <- ce_weights * e + k * tempered * (grad_probs - <p, grad_probs>) in rows that require a gradient.

        Returns:
            [C] `at_target` (ce_weights * e at the target) plus the alignment gradient at the target.
        """
        tokens, s = state.tokens, state.statistics
        inner = all_reduce(inner_products(state.tempered, grad_probs, tokens) * s.tempered_scale, self.row_group)
        k = tokens.pooling_weights * s.tempered_scale / (s.scale * self.temperature)
        softmax_backward_(state.e, state.tempered, tokens.ce_weights, k, inner, grad_probs, tokens)
        if grad_probs.numel() == 0:
            return at_target
        columns, _ = self._target_columns(tokens)
        grad_at_target = grad_probs[tokens.grad_index.clamp_min(0), columns.squeeze(1)]
        return at_target + k * s.tempered_target * (grad_at_target - inner)

    def _products(
        self, state: SoftmaxState, weighted: Tensor, soft: SoftGradient | None, gain: float, grad_scale: float
    ) -> Tensor:
        """Add grad_scale * dz^T weighted (and `soft`) to the head's gradient. Return dz W. `state.e` holds dz."""
        head, dz = self.vocabulary.head, state.e
        if soft is not None and not self._tied:
            self._soft.append(soft)
        elif soft is not None:
            dz = state.e_buffer[: len(state.e) + len(soft.pooled)]
            dz[len(state.e) :] = self._apply_weights(soft.pooled) * gain
            weighted = torch.cat([weighted, soft.grad_u.to(weighted.dtype)])
        if head.grad is not None:
            add_product_(head.grad, dz.T, weighted, grad_scale)
        return state.e @ head.weight

    def to_column_owners(self, pooled: Tensor, sequence_counts: tuple[int, ...]) -> Tensor:
        """Return the [n, v] pooled probabilities of the sequences of all ranks, for the embedding rows of this rank.

        Args:
            pooled: result of `pool`.
            sequence_counts: number of sequences of each rank.
        """
        return pooled

    def from_column_owners(self, grad_probs: Tensor, requires_grad_of_rank: list[int]) -> Tensor:
        """Return the [m, v] grad_probs for the rows and columns of the logits on this rank.

        Args:
            grad_probs: result of `grad_probs`.
            requires_grad_of_rank: number of sequences of each rank that require a gradient.
        """
        return grad_probs

    def finish(self, grad_scale: float) -> None:
        """Add grad_scale * pooled^T grad_u of all chunks to the embedding's gradient, unless `backward` has done so."""
        if self._soft and self.vocabulary.embedding.grad is not None:
            pooled = self._apply_weights(torch.cat([soft.pooled for soft in self._soft]))
            grad_u = torch.cat([soft.grad_u for soft in self._soft])
            add_product_(self.vocabulary.embedding.grad, pooled.T, grad_u, grad_scale)

    def _apply_weights(self, pooled: Tensor) -> Tensor:
        return pooled if self.vocabulary.weights is None else pooled * self.vocabulary.weights

    def _target_columns(self, tokens: SubchunkTokens) -> tuple[Tensor, Tensor]:
        """Return [C, 1] local column of each target (any valid column if not local), and [C] whether it is local."""
        columns = tokens.targets - self.start
        return columns.clamp(0, max(0, self.columns - 1))[:, None], (columns >= 0) & (columns < self.columns)

    def _buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """Return a [rows, v] buffer that is reused for all subchunks of the call."""
        size = rows * self.columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(rows, self.columns)


def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Add alpha * a @ b to `total`, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(total, a, b, alpha=alpha, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b, alpha=alpha)

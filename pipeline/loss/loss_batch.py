"""Target tokens of a micro-batch, with their sequences and pairs.

Shape letters: T target tokens of this rank, S sequences of this rank.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import GlobalLayout


@dataclass(frozen=True)
class LossNormalizers:
    """Divisors of the two loss terms: counts over the global batch (all ranks and gradient accumulation steps).

    Attributes:
        tokens: number of target tokens, weighted by the `ce_weights` of their sequences.
        pairs: number of pairs of a translation and its pivot that both have target tokens.
    """

    tokens: float
    pairs: float


@dataclass(frozen=True)
class RowPart:
    """Part of the target tokens of rows that several consecutive ranks share (sequence parallelism).

    Attributes:
        rows: target tokens of the whole rows, equal on these ranks.
        tokens: [T] indices among them of this rank's target tokens.
        index: number of this rank among the ranks that share the rows.
        count: number of these ranks.
    """

    rows: "LossBatch"
    tokens: Tensor
    index: int
    count: int


@dataclass(frozen=True)
class LossBatch:
    """Layout of the target tokens of one rank, ordered by sequence, with each pivot before its translations.

    Attributes:
        targets: [T] int64, vocabulary id of each target token.
        lengths: [S] int64, number of target tokens of each sequence; they sum to T and may be 0.
        pivot: [S] int64, index of the sequence's pivot in this rank's list, or its own index if it has no pivot.
        problem_id: [S] int64, equal for all sequences of the same problem, across ranks.
        language: [S] int64, index into the run's list of languages.
        token_weights: [T] pooling weights for `pooling: weights`, or None.
        ce_weights: [S] weights of the sequences in the cross entropy, or None for 1.
        layout: the layout of all ranks, if it has been exchanged. A copy with other values must not keep it.
        part: if ranks share rows, the whole rows. All other fields describe this rank's part of each sequence.
    """

    targets: Tensor
    lengths: Tensor
    pivot: Tensor
    problem_id: Tensor
    language: Tensor
    token_weights: Tensor | None = None
    ce_weights: Tensor | None = None
    layout: "GlobalLayout | None" = None
    part: RowPart | None = None

    def to(self, device: torch.device | str) -> "LossBatch":
        """Return a copy with all tensors on `device`."""
        tensors: dict[str, Any] = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def take_part(self, tokens: Tensor, index: int, count: int) -> "LossBatch":
        """Return the part with the target tokens `tokens`, for rank `index` of `count` ranks that share these rows."""
        sequence = self.sequence_of_token()[tokens]
        return replace(
            self,
            targets=self.targets[tokens],
            lengths=torch.bincount(sequence, minlength=len(self.lengths)),
            token_weights=None if self.token_weights is None else self.token_weights[tokens],
            part=RowPart(self, tokens, index, count),
        )

    def paired(self) -> Tensor:
        """Return [S] bool: whether the sequence has a pivot other than itself and both have target tokens."""
        own = torch.arange(len(self.pivot), device=self.pivot.device)
        lengths = self.lengths if self.part is None else self.part.rows.lengths
        return (self.pivot != own) & (lengths > 0) & (lengths[self.pivot] > 0)

    def normalizers(self) -> LossNormalizers:
        """Return the counts of this micro-batch only. Sum them over ranks and gradient accumulation steps.

        If ranks share rows, the first of them counts the pairs.
        """
        pairs = float(self.paired().sum()) if self.part is None or self.part.index == 0 else 0.0
        if self.ce_weights is None:
            return LossNormalizers(float(self.lengths.sum()), pairs)
        return LossNormalizers(float((self.ce_weights * self.lengths).sum()), pairs)

    def sequence_of_token(self) -> Tensor:
        """Return [T] int64: the sequence index of each target token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    def pooling_weights(self, pooling: str, dtype: torch.dtype) -> Tensor:
        """Return the [T] weights a_t of the pooled representations u_i = sum over t in i of a_t * s_t.

        The weights sum to 1 in each sequence, over all its parts. If all token weights of a sequence are 0, its tokens
        weigh the same.

        Args:
            pooling: `mean`, `last` or `weights`.
            dtype: dtype of the result.

        Raises:
            ValueError: `pooling` is `weights` and there are no token weights.
        """
        if self.part is not None:
            return self.part.rows.pooling_weights(pooling, dtype)[self.part.tokens]
        sequence = self.sequence_of_token()
        mean = (1.0 / self.lengths.to(dtype))[sequence]
        if pooling == "mean":
            return mean
        if pooling == "last":
            weights = torch.zeros(len(self.targets), dtype=dtype, device=self.targets.device)
            weights[(self.lengths.cumsum(0) - 1)[self.lengths > 0]] = 1.0
            return weights
        if self.token_weights is None:
            raise ValueError("pooling 'weights' requires token_weights; pass them to LossBatch")
        weights = self.token_weights.to(dtype)
        sums = torch.zeros(len(self.lengths), dtype=dtype, device=weights.device).index_add_(0, sequence, weights)
        return torch.where(sums[sequence] > 0, weights / sums[sequence], mean)

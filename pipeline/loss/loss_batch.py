"""The supervised positions of a micro-batch and the sequences and pairs they belong to.

Shape letters: T supervised positions of this rank, S its sequences.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossNormalizers:
    """What the two terms are divided by: counts over the global batch (all ranks, all accumulation steps)."""

    tokens: float
    pairs: float


@dataclass(frozen=True)
class LossBatch:
    """Layout of one rank's supervised positions, sequence after sequence, each pivot before its translations.

    Attributes:
        targets: [T] int64, the vocabulary id each position has to predict.
        lengths: [S] int64, supervised positions of each sequence; they sum to T and may be 0.
        pivot: [S] int64, index of the sequence's pivot in this rank's list; its own index where it has none.
        problem: [S] int64, equal for all sequences that state the same problem, on any rank.
        language: [S] int64, index into the run's list of languages.
        token_weights: [T] pooling weights for `pooling: weights`, or None.
        ce_weights: [S] weights of the sequences in the cross entropy, or None for 1.
    """

    targets: Tensor
    lengths: Tensor
    pivot: Tensor
    problem: Tensor
    language: Tensor
    token_weights: Tensor | None = None
    ce_weights: Tensor | None = None

    def to(self, device: torch.device | str) -> "LossBatch":
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    def paired(self) -> Tensor:
        """[S] bool: has a pivot other than itself, and both have supervised positions."""
        own = torch.arange(len(self.pivot), device=self.pivot.device)
        return (self.pivot != own) & (self.lengths > 0) & (self.lengths[self.pivot] > 0)

    def normalizers(self) -> LossNormalizers:
        """Counts of this micro-batch alone, to be summed over ranks and accumulation steps."""
        if self.ce_weights is None:
            return LossNormalizers(float(self.lengths.sum()), float(self.paired().sum()))
        return LossNormalizers(float((self.ce_weights * self.lengths).sum()), float(self.paired().sum()))

    def sequence_of_token(self) -> Tensor:
        """[T] int64: the sequence of each position."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    def pooling_weights(self, pooling: str, dtype: torch.dtype) -> Tensor:
        """[T] weights that sum to 1 in each sequence: u_i = sum over its positions t of weight_t * s_t.

        A sequence whose given weights are all 0 is pooled by its mean.
        """
        sequence = self.sequence_of_token()
        mean = (1.0 / self.lengths.to(dtype))[sequence]
        if pooling == "mean":
            return mean
        if pooling == "last":
            weights = torch.zeros(len(self.targets), dtype=dtype, device=self.targets.device)
            weights[(self.lengths.cumsum(0) - 1)[self.lengths > 0]] = 1.0
            return weights
        if self.token_weights is None:
            raise ValueError("pooling 'weights' needs token_weights")
        weights = self.token_weights.to(dtype)
        sums = torch.zeros(len(self.lengths), dtype=dtype, device=weights.device).index_add_(0, sequence, weights)
        return torch.where(sums[sequence] > 0, weights / sums[sequence], mean)

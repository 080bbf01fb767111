"""Distances between pooled representations, and the running means of pooled representations per language.

All tensors are at most [n, d] or [S, d]. None has the size of the vocabulary.
Shape letters: S sequences of all ranks, n sequences of one chunk, m the number of these whose pooled representations
require a gradient, d hidden size, L languages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .chunking import Chunk
from .indexing import bounds, upload
from .layout import GlobalLayout
from .settings import LossSettings


@dataclass
class RunningMeans:
    """Running mean of the pooled representations of each language over micro-steps. Equal on all ranks.

    Attributes:
        means: [L, d] fp32.
        seen: [L] bool, whether the language has a mean yet. If not, its entry in `means` is 0, which has no effect.
    """

    means: Tensor
    seen: Tensor

    @classmethod
    def zeros(cls, languages: int, hidden_size: int, device: torch.device | str = "cpu") -> "RunningMeans":
        """Create the initial running means of L = `languages` languages."""
        return cls(
            torch.zeros(languages, hidden_size, device=device), torch.zeros(languages, dtype=torch.bool, device=device)
        )

    def update(self, pooled: Tensor, language: Tensor, nonempty: Tensor, momentum: float) -> None:
        """Update the mean of each language in the micro-step.

        The new mean is momentum * mean + (1 - momentum) * mean of this micro-step.

        The first micro-step with a language sets its mean.

        Args:
            pooled: [S, d] pooled representations, not centered.
            language: [S] int64.
            nonempty: [S] bool, whether the sequence has target tokens. Other sequences are ignored.
            momentum: weight of the old mean.
        """
        # A product with a one-hot matrix is deterministic on a GPU, unlike index_add_, and no index waits for it.
        languages = torch.arange(len(self.means), device=language.device)
        one_hot = ((language == languages[:, None]) & nonempty).to(self.means.dtype)
        count = one_hot.sum(1, keepdim=True)
        fresh = (one_hot @ pooled.to(self.means.dtype)) / count.clamp_min(1)
        occurs = count.squeeze(1) > 0
        updated = torch.where(self.seen[:, None], torch.lerp(fresh, self.means, momentum), fresh)
        self.means.copy_(torch.where(occurs[:, None], updated, self.means))
        self.seen |= occurs


class PooledRepresentations:
    """Pooled representations of all sequences of the micro-step, filled chunk by chunk, and sums over their pairs.

    Sequences are numbered in chunk order, and each pivot precedes its translations. If ranks share rows, the parts of a
    sequence are numbered, and the first part stands for the sequence in `values`, the pairs and `requires_grad`.

    Attributes:
        values: [S, d] pooled representations, not centered.
        distance_sum, cosine_sum: scalars, sums over the pairs aligned so far.
        requires_grad: for each chunk, [m] indices within the chunk of the sequences that require a gradient.
        of_part: for each chunk, the index in `requires_grad` of each part that requires a gradient. An empty list if no
            rows are shared.
        grad_index_of_all: [S] on the host, index of the sequence among those of its chunk that require a gradient, or
            -1. With shared rows, the parts are counted.
        aligned: [S] bool on the host, whether the sequence is part of a pair.
        requires_grad_of_rank: for each chunk, [R] number of sequences of each rank that require a gradient, on the
            host.
        pivot, problem_id, language: [S], as in `GlobalLayout`, on the device.
        lengths: [S] `whole_lengths` of `GlobalLayout`, on the device.
        counted: [S] bool on the device, whether `values` has the representation of a sequence with target tokens.
    """

    def __init__(
        self,
        layout: GlobalLayout,
        chunks: list[Chunk],
        hidden_size: int,
        dtype: torch.dtype,
        settings: LossSettings,
    ) -> None:
        device = layout.values.device
        self.chunks, self.settings = chunks, settings
        own = torch.arange(len(layout.pivot))
        is_pivot = layout.pivot == own
        lengths = layout.whole_lengths
        paired = ~is_pivot & (lengths > 0) & (lengths.index_select(0, layout.pivot) > 0)
        self.aligned = paired.index_fill(0, layout.pivot[paired], True)
        with_grad = ~is_pivot if "pivot" in settings.detach else torch.ones_like(is_pivot)
        # In chunk order, the sequences of a chunk are consecutive. Those after the last chunk have no target tokens.
        firsts = torch.tensor([chunk.first for chunk in chunks], dtype=torch.int64)
        ends = torch.tensor([chunk.sequences.stop for chunk in chunks], dtype=torch.int64)
        before = bounds(with_grad.to(torch.int64))
        chunk_of_sequence = torch.searchsorted(ends, own, right=True).clamp_max(max(0, len(chunks) - 1))
        local_index = before[:-1] - before[firsts].index_select(0, chunk_of_sequence) if chunks else before[:-1]
        self.grad_index_of_all = torch.where(with_grad, local_index, -1)
        self.requires_grad_of_rank = [before[chunk.sequence_bounds].diff() for chunk in chunks]
        is_first = torch.ones_like(is_pivot) if layout.first_part is None else layout.first_part == own
        pairs, requires_grad = (
            _by_chunk((selected & is_first).nonzero().squeeze(1), firsts, ends) for selected in (paired, with_grad)
        )
        members, of_part = _parts(layout.first_part, chunks, requires_grad, with_grad)

        sequence_fields = [layout.pivot, layout.problem_id, layout.language, lengths, lengths * is_first]
        uploaded = upload([*sequence_fields, *pairs, *requires_grad, *members, *of_part], device)
        self.pivot, self.problem_id, self.language, self.lengths, counted = uploaded[:5]
        self.counted = counted > 0
        self._pairs, self.requires_grad, self._members, self.of_part = (
            uploaded[5 + k * len(chunks) : 5 + (k + 1) * len(chunks)] for k in range(4)
        )
        self.values = torch.zeros(len(own), hidden_size, dtype=dtype, device=device)
        self.distance_sum = self.values.new_zeros(())
        self.cosine_sum = self.values.new_zeros(())

    def sum_parts(self, index: int, pooled: Tensor) -> None:
        """Add the pooled probabilities of all parts of each sequence, in the row of the first part.

        Args:
            index: index of the chunk.
            pooled: [n, v] pooled probabilities of the chunk's sequences, changed in place.
        """
        if self._members:
            first, *others = self._members[index]
            total = pooled[first]
            for parts in others:
                total += pooled[parts]
            pooled[first] = total

    def align(self, index: int, pooled: Tensor, running_means: RunningMeans | None, factor: float) -> Tensor | None:
        """Add the distances of all pairs whose translation is in the chunk.

        Args:
            index: index of the chunk. The pivots of its sequences must be in the chunk itself or, if pivots are
                detached, in earlier chunks. For InfoNCE, the chunk must be the whole micro-step.
            pooled: [n, d] pooled representations of the chunk's sequences.
            running_means: means to subtract, or None.
            factor: factor of the gradient; 0 if no gradient is needed.

        Returns:
            [m, d] gradient factor * d(sum of distances)/du for the sequences that require a gradient, or None if the
            chunk has no pairs or `factor` is 0.
        """
        settings, chunk = self.settings, self.chunks[index]
        self.values[chunk.sequences] = pooled
        pairs = self._pairs[index] + chunk.first
        if len(pairs) == 0:
            return None
        pivots = self.pivot[pairs]
        with torch.enable_grad():
            leaf = pooled.detach().requires_grad_(factor != 0)
            u = self._center(leaf, self.language[chunk.sequences], running_means)
            if "pivot" in settings.detach:
                # Indexing at the end drops the gradient of detached pivots, which InfoNCE also uses as negatives.
                pivot_u = self._center(self.values[pivots], self.language[pivots], running_means)
            else:
                pivot_u = u[pivots - chunk.first]
            translations = u[pairs - chunk.first]
            cosine = cosine_similarity(translations, pivot_u, dim=1)
            if settings.distance == "infonce":
                distances = self._infonce(u, pairs)
            elif settings.distance == "mse":
                distances = ((translations - pivot_u) ** 2).mean(1)
            else:
                distances = 1 - cosine
            total = distances.sum()
        self.distance_sum += total.detach()
        self.cosine_sum += cosine.sum()
        if factor == 0:
            return None
        return torch.autograd.grad(total, leaf)[0][self.requires_grad[index]] * factor

    def _center(self, u: Tensor, language: Tensor, running_means: RunningMeans | None) -> Tensor:
        return u if running_means is None else u - running_means.means[language].to(u.dtype)

    def _infonce(self, u: Tensor, pairs: Tensor) -> Tensor:
        """Return the InfoNCE loss of each pair: -log softmax of the similarity to the pivot.

        The negatives are the sequences of all other problems, in any language.

        Args:
            u: [n, d] representations of the only chunk, so n is S.
            pairs: indices of the translations.
        """
        n = len(u)
        unit = u / u.norm(dim=1, keepdim=True).clamp_min(1e-8)
        similarity = unit[pairs] @ unit.T / self.settings.infonce_temperature
        pivots = self.pivot[pairs, None]
        others = (self.problem_id[pairs, None] != self.problem_id[None, :n]) & self.counted[None, :n]
        similarity = similarity.masked_fill(~others.scatter(1, pivots, True), -torch.inf)
        return -torch.log_softmax(similarity, dim=1).gather(1, pivots).squeeze(1)


def _by_chunk(sequences: Tensor, firsts: Tensor, ends: Tensor) -> list[Tensor]:
    """Divide ascending sequence indices by chunk, and make them relative to the first sequence of the chunk."""
    parts = sequences.tensor_split(torch.searchsorted(sequences, ends).tolist())
    return [part - first for part, first in zip(parts, firsts, strict=False)]


def _parts(
    first_part: Tensor | None, chunks: list[Chunk], requires_grad: list[Tensor], with_grad: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return tables of the parts of sequences for each chunk, or two empty lists if no rows are shared.

    Args:
        first_part: see `GlobalLayout`.
        requires_grad: see `PooledRepresentations`.
        with_grad: [S] bool, whether the sequence of each part requires a gradient.

    Returns:
        For each chunk, [number of ranks that share a row, sequences] indices of all parts within the chunk, and
        `PooledRepresentations.of_part`.
    """
    members: list[Tensor] = []
    of_part: list[Tensor] = []
    if first_part is None:
        return members, of_part
    for chunk, sequences in zip(chunks, requires_grad, strict=False):
        first = first_part[chunk.sequences] - chunk.first
        members.append(first.argsort(stable=True).view(len(first.unique()), -1).T)
        of_part.append(torch.searchsorted(sequences, first[with_grad[chunk.sequences]]))
    return members, of_part

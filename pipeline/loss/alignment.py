"""Distances between summaries, and the running mean summaries of the languages.

Everything here works on [n, d] summaries, never on vocabulary-sized tensors.
Shape letters: S sequences of all ranks, n sequences of one block, m moved ones, d hidden size, L languages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.loss.chunking import Block
from pipeline.loss.layout import Layout, upload
from pipeline.loss.settings import LossSettings


@dataclass
class RunningMeans:
    """Running mean summary of each language, kept over micro-steps; equal on all ranks.

    Attributes:
        means: [L, d] fp32. seen: [L] bool; an unseen language is not centred.
    """

    means: Tensor
    seen: Tensor

    @classmethod
    def zeros(cls, languages: int, hidden_size: int, device: torch.device | str = "cpu") -> "RunningMeans":
        return cls(
            torch.zeros(languages, hidden_size, device=device), torch.zeros(languages, dtype=torch.bool, device=device)
        )

    def update(self, summaries: Tensor, language: Tensor, nonempty: Tensor, momentum: float) -> None:
        """mean <- momentum * mean + (1 - momentum) * mean of this micro-step's [S, d] summaries; the first sets it."""
        language, summaries = language[nonempty], summaries[nonempty].to(self.means.dtype)
        count = torch.bincount(language, minlength=len(self.means)).to(self.means.dtype)
        sums = torch.zeros_like(self.means).index_add_(0, language, summaries)
        now = count > 0
        fresh = sums[now] / count[now, None]
        self.means[now] = torch.where(self.seen[now, None], torch.lerp(fresh, self.means[now], momentum), fresh)
        self.seen |= now


class SummaryTable:
    """Summaries of all sequences of the micro-step, filled block by block; pivots come before their translations.

    Sequences are numbered in the order of the blocks, as in the layout.

    Attributes:
        values: [S, d] summaries, not centred. distance_sum, cosine_sum: over the pairs seen so far.
        moved: of each block, the [m] numbers within it of the sequences whose summaries have a gradient.
        place: [S] on the host, where in its block's list a sequence stands, or -1.
        moved_of_rank: of each block and rank, how many of them it has.
    """

    def __init__(
        self, layout: Layout, blocks: list[Block], hidden_size: int, device: torch.device, settings: LossSettings
    ) -> None:
        self.blocks, self.settings = blocks, settings
        own = torch.arange(len(layout.pivot))
        is_pivot = layout.pivot == own
        paired = ~is_pivot & (layout.length > 0) & (layout.length[layout.pivot] > 0)
        moves = ~is_pivot if "pivot" in settings.detach else torch.ones_like(is_pivot)
        pairs = [paired[block.sequences].nonzero().squeeze(1) for block in blocks]
        moved = [moves[block.sequences].nonzero().squeeze(1) for block in blocks]
        self.place = torch.full_like(own, -1)
        for block, numbers in zip(blocks, moved, strict=True):
            self.place[block.first + numbers] = torch.arange(len(numbers))
        ranks = range(len(layout.lengths))
        self.moved_of_rank = [[int(moves[block.of_rank(rank)].sum()) for rank in ranks] for block in blocks]

        facts = [layout.pivot, layout.problem, layout.language, layout.length]
        uploaded = upload([*facts, *pairs, *moved], device)
        self.pivot, self.problem, self.language, self.length = uploaded[:4]
        self._pairs, self.moved = uploaded[4 : 4 + len(blocks)], uploaded[4 + len(blocks) :]
        self.values = torch.zeros(len(own), hidden_size, dtype=layout.pooling.dtype, device=device)
        self.distance_sum = self.values.new_zeros(())
        self.cosine_sum = self.values.new_zeros(())

    def align(self, index: int, summaries: Tensor, running_means: RunningMeans | None, factor: float) -> Tensor | None:
        """Add the distances of the pairs whose translation is in the block.

        Args:
            index: of the block. It holds or follows the pivot of each of its sequences; where pivots are attached
                it holds them, and for InfoNCE it is the whole micro-step.
            summaries: [n, d] of the block's sequences.

        Returns:
            factor * d(sum of the distances)/du of the block's moved sequences, or None where nothing has a gradient.
        """
        settings, block = self.settings, self.blocks[index]
        self.values[block.sequences] = summaries
        pairs = self._pairs[index] + block.first
        if len(pairs) == 0:
            return None
        pivots = self.pivot[pairs]
        with torch.enable_grad():
            leaf = summaries.detach().requires_grad_(factor != 0)
            u = self._centred(leaf, self.language[block.sequences], running_means)
            if "pivot" in settings.detach:
                # A pivot's own gradient, as a negative of InfoNCE, goes with the choice of moved sequences below.
                pivot_u = self._centred(self.values[pivots], self.language[pivots], running_means)
            else:
                pivot_u = u[pivots - block.first]
            if settings.distance == "infonce":
                distances = self._infonce(u, pairs)
            elif settings.distance == "mse":
                distances = ((u[pairs - block.first] - pivot_u) ** 2).mean(1)
            else:
                distances = 1 - cosine_similarity(u[pairs - block.first], pivot_u, dim=1)
            total = distances.sum()
        self.distance_sum += total.detach()
        self.cosine_sum += cosine_similarity(u[pairs - block.first], pivot_u, dim=1).sum()
        if factor == 0:
            return None
        return torch.autograd.grad(total, leaf)[0][self.moved[index]] * factor

    def _centred(self, u: Tensor, language: Tensor, running_means: RunningMeans | None) -> Tensor:
        return u if running_means is None else u - running_means.means[language].to(u.dtype)

    def _infonce(self, u: Tensor, pairs: Tensor) -> Tensor:
        """[pairs] -log softmax of the pivot's similarity among those of all other problems, in any language.

        u: [n, d] of the only block, in which the sequences have their own numbers.
        """
        n = len(u)
        unit = u / u.norm(dim=1, keepdim=True).clamp_min(1e-8)
        similarity = unit[pairs] @ unit.T / self.settings.infonce_temperature
        pivots = self.pivot[pairs, None]
        others = (self.problem[pairs, None] != self.problem[None, :n]) & (self.length[None, :n] > 0)
        similarity = similarity.masked_fill(~others.scatter(1, pivots, True), -torch.inf)
        return -torch.log_softmax(similarity, dim=1).gather(1, pivots).squeeze(1)

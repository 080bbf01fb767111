"""Distances between summaries, and the running mean summaries of the languages.

Everything here works on [n, d] summaries, never on vocabulary-sized tensors.
Shape letters: S sequences of all ranks, n sequences of one block, d hidden size, L languages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.loss.exchange import Layout
from pipeline.loss.settings import LossSettings


@dataclass
class Centres:
    """Running mean summary of each language, kept over micro-steps; equal on all ranks.

    Attributes:
        means: [L, d] fp32. seen: [L] bool; an unseen language is not centred.
    """

    means: Tensor
    seen: Tensor

    @classmethod
    def zeros(cls, languages: int, hidden_size: int, device: torch.device | str = "cpu") -> "Centres":
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

    Attributes:
        values: [S, d] summaries, not centred. distance_sum, cosine_sum: over the pairs seen so far.
    """

    def __init__(self, layout: Layout, hidden_size: int, dtype: torch.dtype) -> None:
        self.layout = layout
        self.values = torch.zeros(len(layout.pivot), hidden_size, dtype=dtype, device=layout.pivot.device)
        self.distance_sum = self.values.new_zeros(())
        self.cosine_sum = self.values.new_zeros(())

    def align(
        self, block: Tensor, summaries: Tensor, centres: Centres | None, settings: LossSettings, factor: float
    ) -> Tensor | None:
        """Add the distances of the pairs whose translation is in the block; return factor * d(their sum)/du, [n, d].

        Args:
            block: [n] sequence numbers, ascending. It holds or follows the pivot of each; where pivots are
                attached it holds them, and for InfoNCE it is the whole micro-step. summaries: [n, d] of them.

        Returns None where nothing has a gradient.
        """
        layout = self.layout
        self.values[block] = summaries
        pairs = layout.paired[block].nonzero().squeeze(1)
        pivots = layout.pivot[block[pairs]]
        with torch.enable_grad():
            leaf = summaries.detach().requires_grad_(factor != 0)
            u = self._centred(leaf, block, centres)
            if "pivot" in settings.detach:
                u = torch.where((layout.pivot[block] == block)[:, None], u.detach(), u)
                pivot_u = self._centred(self.values[pivots], pivots, centres)
            else:
                pivot_u = u[torch.searchsorted(block, pivots)]
            if settings.distance == "infonce":
                distances = self._infonce(block, u, pairs, settings.infonce_temperature)
            elif settings.distance == "mse":
                distances = ((u[pairs] - pivot_u) ** 2).mean(1)
            else:
                distances = 1 - cosine_similarity(u[pairs], pivot_u, dim=1)
            total = distances.sum()
        self.distance_sum += total.detach()
        self.cosine_sum += cosine_similarity(u[pairs], pivot_u, dim=1).sum()
        if factor == 0 or len(pairs) == 0:
            return None
        return torch.autograd.grad(total, leaf)[0] * factor

    def _centred(self, u: Tensor, numbers: Tensor, centres: Centres | None) -> Tensor:
        return u if centres is None else u - centres.means[self.layout.language[numbers]].to(u.dtype)

    def _infonce(self, block: Tensor, u: Tensor, pairs: Tensor, temperature: float) -> Tensor:
        """[pairs] -log softmax of the pivot's similarity among those of all other problems, in any language."""
        layout = self.layout
        unit = u / u.norm(dim=1, keepdim=True).clamp_min(1e-8)
        similarity = unit[pairs] @ unit.T / temperature
        positive = layout.pivot[block[pairs], None] == block[None, :]
        other = (layout.problem[block[pairs], None] != layout.problem[block][None, :]) & layout.nonempty[block][None, :]
        similarity = similarity.masked_fill(~(positive | other), -torch.inf)
        return -torch.log_softmax(similarity, dim=1)[positive]

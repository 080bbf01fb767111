"""Random SOLAR problems, solved by the sharded loss on this rank and by the dense float64 reference.

Shape letters: T supervised positions, S sequences, V vocabulary, d hidden size, L languages.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.loss import (
    LossBatch,
    LossNormalizers,
    LossSettings,
    RunningMeans,
    Vocabulary,
    VocabularyShard,
    solar_loss,
    solar_loss_reference,
    vocabulary_range,
)
from pipeline.loss.comm import Group, world_of

LANGUAGES = 3


@dataclass(frozen=True)
class Case:
    """One problem. `lengths[r]` is a list of pair groups, each a list of sequence lengths, the pivot's first."""

    lengths: tuple[tuple[tuple[int, ...], ...], ...]
    settings: LossSettings = field(default_factory=LossSettings)
    weight: float = 0.7
    vocab_size: int = 37
    padded_size: int = 48
    hidden_size: int = 8
    tied: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    centred: bool = False
    vocabulary_weights: bool = False
    ce_weights: bool = False
    bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    device: str = "cpu"

    def with_rows(self, rows: int) -> "Case":
        """The same case with room for that many rows of each rank in a chunk."""
        size = torch.finfo(self.dtype).bits // 8
        tensors = 1 + (self.settings.softmax_temperature != 1) + (self.softcap is not None)
        budget = (rows + 0.5) * self.vocab_size * size * tensors / 2**20
        return replace(self, settings=replace(self.settings, memory_budget_mb=budget))


def layout(case: Case, rank: int | None, generator: torch.Generator) -> tuple[LossBatch, list[int]]:
    """The supervised positions of one rank, or of all (None), and how many each rank has."""
    lengths, pivot, problem, language = [], [], [], []
    counts = []
    for r, groups in enumerate(case.lengths):
        counts.append(sum(map(sum, groups)))
        if rank is not None and r != rank:
            continue
        for g, group in enumerate(groups):
            begin = len(lengths)
            for member, length in enumerate(group):
                lengths.append(length)
                pivot.append(begin)
                problem.append(1000 * r + g // 2)  # two groups may state the same problem
                language.append(member % LANGUAGES)
    total = sum(counts)
    first = 0 if rank is None else sum(counts[:rank])
    mine = slice(first, total if rank is None else first + counts[rank])
    n_all = sum(len(group) for groups in case.lengths for group in groups)
    n_before = 0 if rank is None else sum(len(group) for groups in case.lengths[:rank] for group in groups)
    targets = torch.randint(0, case.vocab_size, (total,), generator=generator)
    token_weights = torch.rand(total, generator=generator) + 0.1
    ce_weights = torch.rand(n_all, generator=generator)
    loss_batch = LossBatch(
        targets=targets[mine],
        lengths=torch.tensor(lengths, dtype=torch.int64),
        pivot=torch.tensor(pivot, dtype=torch.int64),
        problem=torch.tensor(problem, dtype=torch.int64),
        language=torch.tensor(language, dtype=torch.int64),
        token_weights=token_weights[mine].double() if case.settings.pooling == "weights" else None,
        ce_weights=ce_weights[n_before : n_before + len(lengths)].double() if case.ce_weights else None,
    )
    return loss_batch, counts


@dataclass(frozen=True)
class Tensors:
    """The random tensors of a case, float64; rounded to its dtype first, so that both sides see the same numbers."""

    hidden: Tensor
    head: Tensor
    embedding: Tensor
    bias: Tensor
    running_means: Tensor
    weights: Tensor


def tensors(case: Case, generator: torch.Generator) -> Tensors:
    tokens = sum(sum(map(sum, groups)) for groups in case.lengths)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(case.dtype).double()

    head = draw(case.vocab_size, case.hidden_size)
    embedding = draw(case.vocab_size, case.hidden_size)
    return Tensors(
        hidden=draw(tokens, case.hidden_size, scale=2.0),
        head=head,
        embedding=head if case.tied else embedding,
        bias=draw(case.vocab_size),
        running_means=draw(LANGUAGES, case.hidden_size, scale=0.1),
        weights=torch.rand(case.vocab_size, generator=generator).double(),
    )


def solve_reference(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Loss and gradients over all ranks' positions by autograd."""
    generator = torch.Generator().manual_seed(case.seed)
    everything, _ = layout(case, None, generator)
    t = tensors(case, generator)
    hidden, head = (x.to(dtype).requires_grad_() for x in (t.hidden, t.head))
    embedding = head if case.tied else t.embedding.to(dtype).requires_grad_()
    bias = t.bias.to(dtype).requires_grad_()
    loss, ce, alignment = solar_loss_reference(
        hidden,
        head,
        embedding,
        everything,
        case.settings,
        case.weight,
        _normalizers(everything),
        running_means=t.running_means.to(dtype) if case.centred else None,
        vocabulary_weights=t.weights.to(dtype) if case.vocabulary_weights else None,
        head_bias=bias if case.bias else None,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
    )
    leaves = [hidden, head, embedding, bias]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    names = ["hidden", "head", "embedding", "bias"]
    return {"loss": loss.detach(), "ce": ce.detach(), "alignment": alignment.detach()} | dict(
        zip(names, grads, strict=True)
    )


def _normalizers(loss_batch: LossBatch) -> LossNormalizers:
    normalizers = loss_batch.normalizers()
    return replace(normalizers, tokens=normalizers.tokens or 1.0, pairs=normalizers.pairs or 1.0)


def solve_sharded(group: Group, case: Case) -> dict[str, Tensor]:
    """The same on this rank's share; gradients of its own positions and vocabulary rows."""
    rank, size = world_of(group)
    generator = torch.Generator().manual_seed(case.seed)
    everything, counts = layout(case, None, generator)
    t = tensors(case, generator)
    mine, _ = layout(case, rank, torch.Generator().manual_seed(case.seed))
    first = sum(counts[:rank])
    mine = mine.to(case.device)
    hidden = t.hidden[first : first + counts[rank]].to(case.device, case.dtype).requires_grad_()
    start, end = vocabulary_range(case.vocab_size, case.padded_size, rank, size)
    total = torch.promote_types(case.dtype, torch.float32)

    def shard(weight: Tensor) -> VocabularyShard:
        rows = weight[start:end].to(case.device, case.dtype)
        return VocabularyShard(rows, start, torch.zeros(rows.shape, dtype=total, device=case.device))

    head = shard(t.head)
    vocabulary = Vocabulary(
        case.vocab_size,
        head,
        head if case.tied else shard(t.embedding),
        bias=t.bias[start:end].to(case.device, case.dtype) if case.bias else None,
        bias_grad=torch.zeros(end - start, dtype=total, device=case.device) if case.bias else None,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        weights=t.weights[start:end].to(case.device, total) if case.vocabulary_weights else None,
    )
    running_means = None
    if case.centred:
        running_means = RunningMeans(
            t.running_means.to(case.device, total), torch.ones(LANGUAGES, dtype=torch.bool, device=case.device)
        )
    result = solar_loss(
        hidden,
        mine,
        vocabulary,
        case.settings,
        case.weight,
        _normalizers(everything),
        LANGUAGES,
        running_means,
        group,
    )
    result.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None and vocabulary.embedding.grad is not None
    found = {"loss": result.loss.detach(), "hidden": hidden.grad, "head": head.grad}
    found["embedding"] = vocabulary.embedding.grad
    if vocabulary.bias_grad is not None:
        found["bias"] = vocabulary.bias_grad
    return {name: value.cpu() for name, value in found.items()}


def errors(case: Case, shares: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, float]:
    """Relative error ||got - expected|| / ||expected|| of loss and gradients, with the ranks' shares put together."""
    found = {}
    for name in shares[0].keys() & {"hidden", "head", "embedding", "bias"}:
        got = torch.cat([share[name].double() for share in shares])
        expected = reference[name]
        scale = float(expected.norm()) or 1.0
        found[name] = float((got - expected).norm()) / scale
    for share in shares:
        error = abs(float(share["loss"]) - float(reference["loss"])) / (abs(float(reference["loss"])) or 1.0)
        found["loss"] = max(found.get("loss", 0.0), error)
    return found

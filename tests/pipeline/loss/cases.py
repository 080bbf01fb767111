"""Random inputs of the SOLAR loss, computed by the sharded loss and by the dense float64 reference.

Shape letters: T target tokens, S sequences, V vocabulary, d hidden size, L languages.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.loss import (
    ClusterSpeeds,
    LossBatch,
    LossNormalizers,
    LossSettings,
    RunningMeans,
    Vocabulary,
    VocabularyShard,
    add_hidden_state_alignment,
    solar_loss,
    solar_loss_reference,
    vocabulary_range,
)
from pipeline.loss.chunking import BufferSizes
from pipeline.loss.comm import Group, rank_and_size
from pipeline.loss.soft_tokens import head_logits, soft_token_probabilities

LANGUAGES = 3
METRICS = ("kept_mass", "entropy", "count")


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one random input.

    `lengths[r]` lists the pair groups of rank r, each a tuple of sequence lengths, the pivot's first.
    With `parts`, r is a group of that many ranks, between which the target tokens are divided at random.
    With `ties`, hidden states and head are small integers, so that many logits of a row are exactly equal.
    """

    lengths: tuple[tuple[tuple[int, ...], ...], ...]
    settings: LossSettings = field(default_factory=LossSettings)
    weight: float = 0.7
    vocab_size: int = 37
    padded_size: int = 48
    hidden_size: int = 8
    tied: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    centered: bool = False
    vocabulary_weights: bool = False
    ce_weights: bool = False
    bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    device: str = "cpu"
    ties: bool = False
    rows: int | None = None
    parts: int = 1
    frozen: bool = False

    def with_rows(self, rows: int) -> "Case":
        """Return the case with a memory budget for that many rows of each rank in a subchunk."""
        return replace(self, rows=rows)

    def budgeted_settings(self, vocabulary: Vocabulary, ranks: int) -> LossSettings:
        """Return the settings with the memory budget of the case on that many ranks."""
        if self.rows is None:
            return self.settings
        sizes = BufferSizes.of(vocabulary, ranks)
        lower, upper = 0.0, 1024.0
        while upper - lower > 1e-9:
            middle = (lower + upper) / 2
            settings = replace(self.settings, memory_budget_mb=middle)
            if sizes.rows_that_fit(settings, settings.head != "gathered") < self.rows:
                lower = middle
            else:
                upper = middle
        return replace(self.settings, memory_budget_mb=upper)


def layout(case: Case, rank: int | None, generator: torch.Generator) -> tuple[LossBatch, list[int]]:
    """Return the target tokens of one rank, or of all ranks if None, and the number of each rank."""
    lengths, pivot, problem_id, language = [], [], [], []
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
                problem_id.append(1000 * r + g // 2)  # two groups state the same problem
                language.append(member % LANGUAGES)
    total = sum(counts)
    first = 0 if rank is None else sum(counts[:rank])
    selected = slice(first, total if rank is None else first + counts[rank])
    n_all = sum(len(group) for groups in case.lengths for group in groups)
    n_before = 0 if rank is None else sum(len(group) for groups in case.lengths[:rank] for group in groups)
    targets = torch.randint(0, case.vocab_size, (total,), generator=generator)
    token_weights = torch.rand(total, generator=generator) + 0.1
    ce_weights = torch.rand(n_all, generator=generator)
    ce_weights[::3] = 0  # only the alignment trains these sequences
    loss_batch = LossBatch(
        targets=targets[selected],
        lengths=torch.tensor(lengths, dtype=torch.int64),
        pivot=torch.tensor(pivot, dtype=torch.int64),
        problem_id=torch.tensor(problem_id, dtype=torch.int64),
        language=torch.tensor(language, dtype=torch.int64),
        token_weights=token_weights[selected].double() if case.settings.pooling == "weights" else None,
        ce_weights=ce_weights[n_before : n_before + len(lengths)].double() if case.ce_weights else None,
    )
    return loss_batch, counts


@dataclass(frozen=True)
class Tensors:
    """Random tensors of a case in float64, rounded to its dtype first, so that both losses get the same numbers."""

    hidden: Tensor
    head: Tensor
    embedding: Tensor
    bias: Tensor
    running_means: Tensor
    weights: Tensor
    layer: Tensor


def tensors(case: Case, generator: torch.Generator) -> Tensors:
    """Draw the tensors of a case."""
    tokens = sum(sum(map(sum, groups)) for groups in case.lengths)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(case.dtype).double()

    head = draw(case.vocab_size, case.hidden_size)
    embedding = draw(case.vocab_size, case.hidden_size)
    hidden = draw(tokens, case.hidden_size, scale=2.0)
    if case.ties:
        head, hidden = head.round(), hidden.round().clamp(-1, 1)
    return Tensors(
        hidden=hidden,
        head=head,
        embedding=head if case.tied else embedding,
        bias=draw(case.vocab_size),
        running_means=draw(LANGUAGES, case.hidden_size, scale=0.1),
        weights=torch.rand(case.vocab_size, generator=generator).double(),
        layer=draw(tokens, case.hidden_size),
    )


def reference_results(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Compute loss and gradients over all ranks' target tokens with the reference and autograd."""
    generator = torch.Generator().manual_seed(case.seed)
    global_batch, _ = layout(case, None, generator)
    t = tensors(case, generator)
    hidden, head, layer = (x.to(dtype).requires_grad_() for x in (t.hidden, t.head, t.layer))
    embedding = head if case.tied else t.embedding.to(dtype).requires_grad_()
    bias = t.bias.to(dtype).requires_grad_()
    loss, ce, alignment = solar_loss_reference(
        hidden,
        head,
        embedding,
        global_batch,
        case.settings,
        case.weight,
        _normalizers(global_batch),
        running_means=t.running_means.to(dtype) if case.centered else None,
        vocabulary_weights=t.weights.to(dtype) if case.vocabulary_weights else None,
        head_bias=bias if case.bias else None,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        layer_hidden=layer,
    )
    leaves = [hidden, head, embedding, bias, layer]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    names = ["hidden", "head", "embedding", "bias", "layer"]
    scalars = {"loss": loss.detach(), "ce": ce.detach(), "alignment": alignment.detach()}
    return scalars | dict(zip(names, grads, strict=True)) | _top_k_metrics(case, t, global_batch)


@torch.no_grad()
def _top_k_metrics(case: Case, t: Tensors, loss_batch: LossBatch) -> dict[str, Tensor]:
    """Compute the means over the target tokens of pairs of the kept mass and the entropy of the soft tokens."""
    pooling_weights = loss_batch.pooling_weights(case.settings.pooling, torch.float64)
    members = {i for i, paired in enumerate(loss_batch.paired().tolist()) if paired}
    members |= {int(loss_batch.pivot[i]) for i in members}
    rows = [
        row
        for row, sequence in enumerate(loss_batch.sequence_of_token().tolist())
        if sequence in members and pooling_weights[row] > 0
    ]
    if case.settings.num_selected is None or not rows:
        return {name: torch.zeros(()) for name in METRICS}
    bias = t.bias if case.bias else None
    z = head_logits(t.hidden[rows], t.head, bias, case.logit_scale, case.softcap)
    q = soft_token_probabilities(z, case.settings.softmax_temperature, case.settings.top_k)
    p = torch.softmax(z, dim=1)
    kept_mass, entropy = p[q > 0].sum() / len(rows), torch.special.entr(q).sum() / len(rows)
    return {"kept_mass": kept_mass, "entropy": entropy, "count": torch.tensor(float(len(rows)))}


def _normalizers(loss_batch: LossBatch) -> LossNormalizers:
    normalizers = loss_batch.normalizers()
    return replace(normalizers, tokens=normalizers.tokens or 1.0, pairs=normalizers.pairs or 1.0)


def local_inputs(case: Case, rank: int) -> tuple[LossBatch, Tensor, Tensor, Tensors, LossNormalizers]:
    """Return this rank's target tokens, their indices among those of all ranks, their hidden states, and the rest."""
    generator = torch.Generator().manual_seed(case.seed)
    global_batch, counts = layout(case, None, generator)
    t = tensors(case, generator)
    member, part = divmod(rank, case.parts)
    local, _ = layout(case, member, torch.Generator().manual_seed(case.seed))
    tokens = torch.arange(counts[member])
    if case.parts > 1:
        owner = torch.randint(0, case.parts, (counts[member],), generator=torch.Generator().manual_seed(case.seed))
        tokens = (owner == part).nonzero().squeeze(1)
        local = local.take_part(tokens, part, case.parts)
    local, tokens = local.to(case.device), tokens + sum(counts[:member])
    hidden = t.hidden[tokens].to(case.device, case.dtype).requires_grad_()
    return local, tokens, hidden, t, _normalizers(global_batch)


def sharded_results(group: Group, case: Case, ranks_per_node: int = 1) -> dict[str, Tensor]:
    """Compute the loss, and the gradients of this rank's target tokens and vocabulary rows, with the sharded loss."""
    rank, size = rank_and_size(group)
    local, tokens, hidden, t, normalizers = local_inputs(case, rank)
    start, end = vocabulary_range(case.vocab_size, case.padded_size, rank, size)
    total = torch.promote_types(case.dtype, torch.float32)

    def shard(weight: Tensor) -> VocabularyShard:
        rows = weight[start:end].to(case.device, case.dtype)
        grad = None if case.frozen else torch.zeros(rows.shape, dtype=total, device=case.device)
        return VocabularyShard(rows, start, grad)

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
        padded_size=case.padded_size,
    )
    seen = torch.ones(LANGUAGES, dtype=torch.bool, device=case.device)
    means = RunningMeans(t.running_means.to(case.device, total), seen) if case.centered else None
    settings, speeds = case.budgeted_settings(vocabulary, size), ClusterSpeeds(ranks_per_node=ranks_per_node)
    result = solar_loss(hidden, local, vocabulary, settings, case.weight, normalizers, LANGUAGES, means, group, speeds)
    layer = t.layer[tokens].to(case.device, case.dtype).requires_grad_()
    if case.settings.pooling_tokens == "hidden_states":
        add_hidden_state_alignment(result, layer, local, case.settings, case.weight, normalizers, means, group)
    assert not (result.distance_sum.requires_grad or result.cosine_sum.requires_grad)
    result.loss.backward()
    assert hidden.grad is not None
    layer_grad = torch.zeros_like(layer) if layer.grad is None else layer.grad
    results = {"loss": result.loss.detach(), "hidden": hidden.grad, "layer": layer_grad, "tokens": tokens}
    if head.grad is not None and vocabulary.embedding.grad is not None:
        results |= {"head": head.grad, "embedding": vocabulary.embedding.grad}
    assert len(results) == (4 if case.frozen else 6)
    count = result.soft_token_count
    results |= {"kept_mass": result.kept_mass / count.clamp_min(1), "count": count.to(total)}
    results["entropy"] = result.soft_token_entropy / count.clamp_min(1)
    if vocabulary.bias_grad is not None:
        results["bias"] = vocabulary.bias_grad
    return {name: value.cpu() for name, value in results.items()}


def errors(case: Case, parts: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative errors ||actual - expected|| / ||expected|| of loss and gradients over all ranks."""
    relative = {}
    for name in parts[0].keys() & {"hidden", "head", "embedding", "bias", "layer"}:
        actual = torch.cat([part[name].double() for part in parts])
        expected = reference[name]
        if name in ("hidden", "layer") and "tokens" in parts[0]:
            expected = expected[torch.cat([part["tokens"] for part in parts])]
        scale = float(expected.norm())
        # Below this, the terms of the gradient cancel, and the float64 reference itself is rounding only.
        relative[name] = float((actual - expected).norm()) / (scale if scale > 1e-13 else 1.0)
    for part in parts:
        error = abs(float(part["loss"]) - float(reference["loss"])) / (abs(float(reference["loss"])) or 1.0)
        relative["loss"] = max(relative.get("loss", 0.0), error)
    return relative


def metric_errors(parts: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest absolute error of each metric of the soft tokens over all ranks."""
    return {name: max(abs(float(part[name] - reference[name])) for part in parts) for name in METRICS}

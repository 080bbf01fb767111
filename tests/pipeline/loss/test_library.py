"""The loss as a function of tensors: every form of the vocabulary matrices, compared with the dense reference."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor

from data_prep.shards.format import TRANSLATION, PackedRow
from pipeline.data.micro_batch import collate
from pipeline.loss import (
    LossBatch,
    LossSettings,
    VocabularyShard,
    alignment_sft_loss,
    solar_loss,
    solar_loss_reference,
    target_tokens,
    vocabulary_range,
)
from pipeline.loss.comm import Group, rank_and_size
from pipeline.loss.library import Matrix
from tests.pipeline.loss.cases import LANGUAGES, Case, errors, layout, reference_results, tensors
from tests.workers import Workers

UNEVEN = (((3, 2, 5), (4,), (1, 3)), ((7, 1),), ())
LOSS_SCALE = 8.0  # multiplies the loss before backward


def library_results(group: Group, case: Case, form: str) -> dict[str, Tensor]:
    """Compute the loss, and the gradients of this rank's target tokens and rows, in fp32."""
    rank, ranks = rank_and_size(group)
    generator = torch.Generator().manual_seed(case.seed)
    _, counts = layout(case, None, generator)
    t = tensors(case, generator)
    local, _ = layout(case, rank, torch.Generator().manual_seed(case.seed))
    first = sum(counts[:rank])
    hidden = t.hidden[first : first + counts[rank]].float().requires_grad_()
    padded = case.padded_size if form == "shards" else ranks * -(-case.vocab_size // ranks)
    start, end = vocabulary_range(case.vocab_size, padded, rank, ranks)

    def matrix(full: Tensor) -> Matrix:
        full = full.float()
        if form == "full":
            return full.requires_grad_()
        if form == "DTensors":
            mesh = DeviceMesh.from_group(group, "cpu")  # type: ignore[arg-type]
            return distribute_tensor(full, mesh, [Shard(0)]).requires_grad_()
        rows = torch.zeros(padded // ranks, full.shape[1])  # with padding
        rows[: end - start] = full[start:end]
        return VocabularyShard(rows.requires_grad_(), start)

    def gradient(matrix: Matrix) -> Tensor:
        leaf = matrix.weight if isinstance(matrix, VocabularyShard) else matrix
        grad = leaf.grad
        assert grad is not None
        if isinstance(grad, DTensor):
            return grad.to_local() / LOSS_SCALE
        return grad[start:end] / LOSS_SCALE / ranks if form == "full" else grad[: end - start] / LOSS_SCALE

    averaged = form != "shards"  # otherwise the loop sums the gradients of hidden states over ranks
    factor = ranks if averaged else 1
    head = matrix(t.head)
    embedding = head if case.tied else matrix(t.embedding)
    loss, _ = alignment_sft_loss(
        hidden,
        local,
        head,
        embedding,
        case.settings,
        vocab_size=case.vocab_size,
        alignment_weight=case.weight,
        languages=LANGUAGES,
        logit_scale=case.logit_scale,
        softcap=case.softcap,
        vocabulary_weights=t.weights if case.vocabulary_weights else None,  # float64, unlike the matrices
        group=group,
        averaged_gradients=averaged,
    )
    (LOSS_SCALE * loss).backward()
    assert hidden.grad is not None
    results = {"loss": loss.detach(), "hidden": hidden.grad / LOSS_SCALE / factor, "head": gradient(head)}
    return results | {"embedding": gradient(embedding)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("form", ["full", "shards", "DTensors"])
def test_alignment_sft_loss_fills_all_gradients(workers: Workers, form: str, ranks: int) -> None:
    for tied, extra in ((True, {"softcap": 3.0}), (False, {"vocabulary_weights": True, "logit_scale": 0.5})):
        case = Case(UNEVEN[:ranks], LossSettings(detach=(), top_k=7), tied=tied, **extra)  # type: ignore[arg-type]
        relative = errors(case, workers.run(library_results, ranks, case, form), reference_results(case))
        assert max(relative.values()) <= 1e-6, relative
        wrong = errors(
            case, workers.run(library_results, ranks, replace(case, weight=0.71), form), reference_results(case)
        )
        assert min(wrong[name] for name in ("loss", "hidden", "head")) > 1e-5


def test_alignment_sft_loss_frozen_embedding_gets_no_gradient() -> None:
    case = Case(UNEVEN[:1], tied=False)
    t = tensors(case, generator := torch.Generator().manual_seed(0))
    batch, _ = layout(case, None, generator)
    hidden, head, embedding = t.hidden.float().requires_grad_(), t.head.float().requires_grad_(), t.embedding.float()
    loss, _ = alignment_sft_loss(hidden, batch, head, embedding, languages=LANGUAGES)
    loss.backward()
    assert hidden.grad is not None and head.grad is not None and embedding.grad is None


def test_alignment_sft_loss_frozen_decoder_still_trains_vocabulary() -> None:
    case = Case(UNEVEN[:1], LossSettings(detach=()), tied=False)
    t = tensors(case, generator := torch.Generator().manual_seed(0))
    batch, _ = layout(case, None, generator)
    grads = []
    for is_frozen in (True, False):
        matrices = [matrix.float().clone().requires_grad_() for matrix in (t.head, t.embedding)]
        hidden = t.hidden.float().requires_grad_(not is_frozen)
        alignment_sft_loss(hidden, batch, *matrices, languages=LANGUAGES)[0].backward()
        grads.append([matrix.grad for matrix in matrices])
    assert all(grad is not None and grad.any() for grad in grads[1])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_alignment_sft_loss_under_autocast() -> None:
    case = Case(UNEVEN[:1], LossSettings(distance="infonce"))
    t = tensors(case, generator := torch.Generator().manual_seed(0))
    batch, _ = layout(case, None, generator)
    hidden, head = t.hidden.float(), t.head.float()
    expected, _ = alignment_sft_loss(hidden, batch, head, head, languages=LANGUAGES)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = alignment_sft_loss(hidden, batch, head, head, languages=LANGUAGES)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_alignment_sft_loss_hidden_states_of_other_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case(UNEVEN[:1])
    t = tensors(case, generator := torch.Generator().manual_seed(0))
    batch, _ = layout(case, None, generator)
    hidden, head = t.hidden.to(dtypes[0]).requires_grad_(), t.head.to(dtypes[1]).requires_grad_()
    loss, _ = alignment_sft_loss(hidden, batch, head, head, languages=LANGUAGES)
    loss.backward()
    same, _ = alignment_sft_loss(hidden.detach().to(dtypes[1]), batch, head, head, languages=LANGUAGES)
    assert torch.equal(loss, same) and hidden.grad is not None and hidden.grad.dtype == dtypes[0] and hidden.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centring": True}, "centring and vocabulary_weights"),
        ({"vocabulary_weights": "w.safetensors"}, "centring and vocabulary_weights"),
        ({"pooling_tokens": "hidden_states"}, "'hidden_states' is a setting of the trainer"),
    ],
)
def test_alignment_sft_loss_rejects_settings_of_the_trainer(changes: dict[str, object], message: str) -> None:
    t = tensors(Case(UNEVEN[:1]), generator := torch.Generator().manual_seed(0))
    batch, _ = layout(Case(UNEVEN[:1]), None, generator)
    settings = LossSettings(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        alignment_sft_loss(t.hidden, batch, t.head, t.head, settings, languages=LANGUAGES)


def test_alignment_sft_loss_rejects_shard_with_other_start(workers: Workers) -> None:
    assert workers.run(_misplaced, 2) == [
        "rank 0: a VocabularyShard of 5 rows, with padding, starts at 0, not at 1",
        "rank 1: a VocabularyShard of 5 rows, with padding, starts at 5, not at 6",
    ]


def _misplaced(group: Group) -> str:
    """Give each rank 5 rows as if the one before it had 6."""
    batch, _ = layout(Case(UNEVEN[:1]), 0, torch.Generator().manual_seed(0))
    shard = VocabularyShard(torch.zeros(5, 8), 5 * rank_and_size(group)[0] + 1)
    with pytest.raises(ValueError, match="VocabularyShard") as caught:
        alignment_sft_loss(torch.zeros(len(batch.targets), 8), batch, shard, shard, vocab_size=10, group=group)
    return str(caught.value)


def test_alignment_sft_loss_rejects_other_placements(workers: Workers) -> None:
    assert all("placement" in message for message in workers.run(_replicated, 2))


def _replicated(group: Group) -> str:
    case = Case(UNEVEN[:1])
    batch, _ = layout(case, 0, torch.Generator().manual_seed(0))
    matrix = distribute_tensor(torch.zeros(6, 8), DeviceMesh.from_group(group, "cpu"), [Replicate()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="placement") as caught:
        alignment_sft_loss(torch.zeros(len(batch.targets), 8), batch, matrix, matrix, group=group)
    return str(caught.value)


def test_target_tokens_equal_those_of_collate() -> None:
    labels = np.array([-100, 5, 6, -100, -100, 8, 9, -100], np.int32)
    lengths = np.array([3, 4, 1], np.int32)
    row = PackedRow(np.arange(8, dtype=np.int32), labels, lengths, ["a"] * 3, ["en"] * 3, [TRANSLATION] * 3)
    expected = collate([row], ["en"], 0)
    found = target_tokens(torch.from_numpy(labels).long(), torch.from_numpy(lengths).long())
    wanted = [expected.positions, expected.loss_batch.targets, expected.loss_batch.lengths]
    assert [part.tolist() for part in found] == [part.tolist() for part in wanted]
    labels[3] = 7  # the first token of a sequence
    again = target_tokens(torch.from_numpy(labels).long(), torch.from_numpy(lengths).long())
    assert [part.tolist() for part in again] == [part.tolist() for part in wanted]


def _batch(lengths: list[int], pivot: list[int], targets: list[int] | None = None) -> LossBatch:
    """Return a batch in which all sequences translate one problem."""
    values = targets or [3 * i % 37 for i in range(sum(lengths))]
    zeros = torch.zeros(len(lengths), dtype=torch.int64)
    return LossBatch(torch.tensor(values), torch.tensor(lengths), torch.tensor(pivot), zeros, zeros)


ONE_SEQUENCE_AT_A_TIME = LossSettings(memory_budget_mb=1e-6)


@pytest.mark.parametrize(
    ("batch", "tokens", "settings", "message"),
    [
        (_batch([5, 4], [1, 1]), 9, LossSettings(), "a pivot must precede its translations"),
        (_batch([2, 2, 2, 2], [0, 1, 0, 1]), 8, LossSettings(detach=()), "must follow it directly"),
        (_batch([5, 4], [0, -1]), 9, LossSettings(), "must be an index of the 2 sequences"),
        (_batch([5, 4, 3], [0, 0, 1]), 12, LossSettings(), "of a pivot must be its own index"),
        (_batch([2], [0], [1, 37]), 2, LossSettings(), "targets must be between 0 and 36"),
        (_batch([2], [0], [1, -100]), 2, LossSettings(), "targets must be between 0 and 36"),
        (_batch([2, 1], [0, 0]), 7, LossSettings(), r"hidden has shape \(7, 8\), but there are 3 target tokens"),
        (_batch([2, 1], [0, 0], [1, 2]), 2, LossSettings(), "lengths sum to 3, but there are 2"),
        (_batch([2, 1], [0, 0]), 3, LossSettings(distance="l2"), "distance is 'l2'; choose from cosine"),  # type: ignore[arg-type]
        (_batch([2, 1], [0, 0]), 3, LossSettings(detach=("pivots",)), "detach has pivots"),  # type: ignore[arg-type]
        (_batch([2, 1], [0, 0]), 3, LossSettings(top_k=0), "top_k is 0; it must be at least 1"),
    ],
)
def test_alignment_sft_loss_rejects_what_it_would_compute_wrongly(
    batch: LossBatch, tokens: int, settings: LossSettings, message: str
) -> None:
    matrix = torch.zeros(37, 8)
    with pytest.raises(ValueError, match=message):
        alignment_sft_loss(torch.zeros(tokens, 8), batch, matrix, matrix, settings)


@pytest.mark.parametrize(
    ("pivot", "settings"),
    [
        ([0, 1, 0, 1], ONE_SEQUENCE_AT_A_TIME),
        ([1, 1, 3, 3], replace(ONE_SEQUENCE_AT_A_TIME, distance="infonce", detach=())),
    ],
)
def test_alignment_sft_loss_of_other_orders_equals_reference(pivot: list[int], settings: LossSettings) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = replace(_batch([5, 4, 6, 7], pivot), problem_id=torch.tensor(pivot))
    hidden, matrix = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (22, 37))
    expected = solar_loss_reference(hidden, matrix, matrix, batch, settings, 1.0, batch.normalizers())[0]
    loss, _ = alignment_sft_loss(hidden, batch, matrix, matrix, settings)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_alignment_sft_loss_selects_the_gpu_of_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches kernels on the current device, which may be another one."""
    selected: list[Tensor] = []

    class Selection(nullcontext[None]):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__()
            selected.append(tensor)

        def __exit__(self, *_: object) -> None:
            selected.clear()

    def solar_loss_on_selected(hidden: Tensor, *arguments: Any) -> Any:
        assert len(selected) == 1 and selected[0] is hidden
        return solar_loss(hidden, *arguments)

    monkeypatch.setattr(torch.cuda, "device_of", Selection)
    monkeypatch.setattr("pipeline.loss.library.solar_loss", solar_loss_on_selected)
    matrix = torch.zeros(37, 8)
    alignment_sft_loss(torch.zeros(9, 8), _batch([5, 4], [0, 0]), matrix, matrix)
    assert not selected


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_alignment_sft_loss_head_and_embedding_of_different_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case(UNEVEN[:1], LossSettings(top_k=None), tied=False)
    t = tensors(case, generator := torch.Generator().manual_seed(0))
    batch, _ = layout(case, None, generator)
    gradients = []
    for head_dtype, embedding_dtype in (dtypes, (torch.float64, torch.float64)):
        head = t.head.bfloat16().to(head_dtype).requires_grad_()
        embedding = t.embedding.bfloat16().to(embedding_dtype).requires_grad_()
        hidden = t.hidden.bfloat16().to(head_dtype).requires_grad_()
        alignment_sft_loss(hidden, batch, head, embedding, case.settings)[0].backward()
        gradients.append([leaf.grad for leaf in (hidden, head, embedding)])
    for actual, expected in zip(*gradients, strict=True):
        assert actual is not None and expected is not None
        assert float((actual.double() - expected).norm() / expected.norm()) < 0.02

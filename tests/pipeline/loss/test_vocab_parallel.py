"""Compare the sharded loss with the dense float64 reference: every setting, 1 to 4 ranks, uneven and empty inputs."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loss import LossBatch, LossNormalizers, LossSettings, Vocabulary, VocabularyShard, kernels, solar_loss
from pipeline.loss.comm import Group, rank_and_size
from pipeline.loss.settings import Head
from tests.pipeline.loss.cases import Case, errors, metric_errors, reference_results, sharded_results
from tests.workers import Workers

# Bounds on ||error|| / ||expected||. fp32 sums of this size lose a few units of 6e-8. InfoNCE divides cosines by 0.1.
FP32, FP32_INFONCE, FP64 = 1e-6, 4e-6, 1e-12

UNEVEN = (((3, 2, 5), (4,), (1, 3)), ((7, 1),), ((2, 2, 2, 2), (6, 5)), ((1, 1), (9, 4)))
ONE_RANK_EMPTY = (((3, 2, 5), (4, 4)), (), ((2, 3),), ((5, 1),))
EMPTY_SEQUENCES = (((3, 0, 5), (0, 4)), ((0,),), ((2, 3),), ((0, 0), (5, 1)))
NO_PAIRS = (((3,), (5,)), ((4,),), ((2,), (1,)), ((8,),))
NOTHING = ((), ((0, 0),), (), ())

HEADS: tuple[Head, ...] = ("vocab_parallel", "gathered")

LAYOUTS = {
    "uneven": UNEVEN,
    "one rank empty": ONE_RANK_EMPTY,
    "empty sequences": EMPTY_SEQUENCES,
    "no pairs": NO_PAIRS,
    "nothing": NOTHING,
}

FULL = LossSettings(top_k=None)
SETTINGS = {
    "default": LossSettings(),
    "full mixture": FULL,
    "mse": LossSettings(distance="mse", top_k=3),
    "infonce": LossSettings(distance="infonce"),
    "temperature": LossSettings(softmax_temperature=2.5),
    "full mixture, temperature": replace(FULL, softmax_temperature=2.5),
    "cold": LossSettings(softmax_temperature=0.5, detach=(), top_k=5),
    "full mixture, cold": replace(FULL, softmax_temperature=0.5, detach=()),
    "last": LossSettings(pooling="last"),
    "weights": LossSettings(pooling="weights", soft_token_embeddings="output"),
    "attached": LossSettings(detach=(), top_k=1),
    "embeddings detached": LossSettings(detach=("embeddings",)),
    "probabilities detached": LossSettings(detach=("pivot", "probabilities")),
    "hard": LossSettings(pooling_tokens="hard", softmax_temperature=2.5, detach=()),
    "hidden states": LossSettings(pooling_tokens="hidden_states", pooling="last", distance="mse"),
    "hidden states, infonce": LossSettings(pooling_tokens="hidden_states", distance="infonce", detach=()),
    "infonce attached": replace(FULL, distance="infonce", detach=(), softmax_temperature=1.5),
}


def check(workers: Workers, ranks: int, case: Case, bound: float) -> None:
    """Assert that the errors of a case on the first `ranks` ranks are within the bound.

    The kept mass is an exponential of a difference of logits divided by the temperature, so it loses a few digits.
    """
    case = replace(case, lengths=case.lengths[: ranks // case.parts])
    parts, reference = workers.run(sharded_results, ranks, case), reference_results(case)
    relative, metrics = errors(case, parts, reference), metric_errors(parts, reference)
    assert all(error <= bound for error in relative.values()), relative
    assert all(error <= 20 * bound for error in metrics.values()), metrics


def bound_of(case: Case) -> float:
    """Return the bound on the relative errors of a case."""
    if case.dtype == torch.float64:
        return FP64
    return FP32_INFONCE if case.settings.distance == "infonce" else FP32


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_layouts(workers: Workers, layout: str, ranks: int, tied: bool) -> None:
    for head in HEADS:
        check(workers, ranks, Case(LAYOUTS[layout], LossSettings(head=head), tied=tied), FP32)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_state_alignment_layouts(workers: Workers, layout: str, ranks: int) -> None:
    for detach, centered in (((), False), (("pivot",), True)):
        settings = LossSettings(pooling_tokens="hidden_states", distance="infonce", detach=detach)  # type: ignore[arg-type]
        check(workers, ranks, Case(LAYOUTS[layout], settings, centered=centered, dtype=torch.float64), FP64)


ONE_ROW = [(name, 1) for name in ("default", "full mixture, cold", "infonce attached", "hidden states, infonce")]


@pytest.mark.parametrize(("name", "rows"), ONE_ROW + [(name, rows) for name in SETTINGS for rows in (4, 100)])
def test_loss_settings_and_chunks(workers: Workers, name: str, rows: int) -> None:
    for head in HEADS:
        case = Case(UNEVEN, replace(SETTINGS[name], head=head), tied=False).with_rows(rows)
        check(workers, 3, case, bound_of(case))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "extra",
    [
        {"centered": True},
        {"vocabulary_weights": True},
        {"ce_weights": True},
        {"bias": True, "logit_scale": 0.25},
        {"softcap": 3.0, "logit_scale": 2.0},
    ],
    ids=lambda extra: " ".join(extra),
)
def test_loss_families_weights_and_centering(workers: Workers, extra: dict[str, object], ranks: int) -> None:
    warm = LossSettings(softmax_temperature=2.0, detach=(), top_k=7)
    for loss_settings, tied in ((LossSettings(), True), (warm, False), (replace(warm, top_k=None), False)):
        for head in HEADS:
            case = Case(UNEVEN, replace(loss_settings, head=head), tied=tied, **extra)  # type: ignore[arg-type]
            check(workers, ranks, case.with_rows(5), FP32)


SHARED_ROWS = [(name, 4, 2) for name in SETTINGS] + [("default", 2, 2), ("infonce attached", 4, 4)]


@pytest.mark.parametrize(("name", "ranks", "parts"), SHARED_ROWS)
def test_loss_rows_shared_by_ranks(workers: Workers, name: str, ranks: int, parts: int) -> None:
    """Divide the target tokens of each sequence between ranks, so that parts of many sequences are empty."""
    centered, weighted = name in ("default", "infonce attached"), name in ("mse", "cold")
    for head, lengths, rows in ((HEADS[0], UNEVEN, 1), (HEADS[1], EMPTY_SEQUENCES, 3), (HEADS[0], NOTHING, 100)):
        case = Case(lengths, replace(SETTINGS[name], head=head), parts=parts, centered=centered, ce_weights=weighted)
        check(workers, ranks, case.with_rows(rows), bound_of(case))


@pytest.mark.parametrize("vocab_size", [12, 13, 5])
def test_loss_uneven_vocabulary(workers: Workers, vocab_size: int) -> None:
    """Use vocabularies of which the last ranks have fewer rows, or none at all."""
    for head in HEADS:
        check(workers, 4, Case(UNEVEN, LossSettings(head=head), vocab_size=vocab_size, padded_size=16), FP32)


groups = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_loss_random_combinations(workers: Workers, data: st.DataObject) -> None:
    """Compare in float64, so that errors beyond rounding exceed the bound."""
    ranks = data.draw(st.integers(1, 4))
    parts = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if ranks % n == 0]))
    case = Case(
        lengths=data.draw(st.lists(groups, min_size=ranks // parts, max_size=ranks // parts).map(tuple)),
        parts=parts,
        settings=LossSettings(
            distance=data.draw(st.sampled_from(["cosine", "mse", "infonce"])),
            softmax_temperature=data.draw(st.sampled_from([1.0, 0.1, 0.7, 3.0, 10.0])),
            top_k=data.draw(st.sampled_from([None, 1, 2, 3, 5, 20, 24, 1000])),
            soft_token_embeddings=data.draw(st.sampled_from(["input", "output"])),
            pooling_tokens=data.draw(st.sampled_from(["soft", "hard", "hidden_states"])),
            pooling=data.draw(st.sampled_from(["mean", "last", "weights"])),
            head=data.draw(st.sampled_from(HEADS)),
            detach=tuple(data.draw(st.sets(st.sampled_from(["pivot", "embeddings", "probabilities"])))),
        ),
        vocab_size=data.draw(st.integers(2, 24)),
        padded_size=24,
        hidden_size=data.draw(st.integers(2, 9)),
        tied=data.draw(st.booleans()),
        centered=data.draw(st.booleans()),
        vocabulary_weights=data.draw(st.booleans()),
        ce_weights=data.draw(st.booleans()),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        bias=data.draw(st.booleans()),
        weight=data.draw(st.sampled_from([0.0, 0.3, 4.0])),
        seed=data.draw(st.integers(0, 1000)),
        dtype=torch.float64,
        ties=data.draw(st.booleans()),
    ).with_rows(data.draw(st.integers(1, 12)))
    check(workers, ranks, case, 1e-9 if case.settings.distance == "infonce" else 1e-10)


def test_hard_tokens_depend_on_targets_only() -> None:
    """Check that no setting of the probabilities changes anything, and that all of the alignment gradient is in E."""
    case = Case(UNEVEN[:1], LossSettings(pooling_tokens="hard"), tied=False)
    expected, plain = sharded_results(None, case), sharded_results(None, replace(case, weight=0.0))
    for changes in ({"detach": ("pivot", "probabilities")}, {"top_k": None, "softmax_temperature": 3.0}):
        actual = sharded_results(None, replace(case, settings=replace(case.settings, **changes)))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(torch.equal(plain[name], expected[name]) for name in ("hidden", "head"))
    assert not torch.equal(plain["embedding"], expected["embedding"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_half_precision_no_worse_than_dense(workers: Workers, temperature: float, dtype: torch.dtype) -> None:
    """Check that errors are no larger than those of autograd in the same dtype, on the same rounded inputs."""
    means = {"sharded": torch.zeros(4), "dense": torch.zeros(4)}
    for seed in range(6):
        case = Case(
            UNEVEN[:2],
            LossSettings(head=HEADS[seed % 2], softmax_temperature=temperature),
            tied=seed % 3 == 0,
            dtype=dtype,
            vocab_size=301,
            padded_size=302,
            hidden_size=32,
            seed=seed,
        )
        expected = reference_results(case)
        sharded = errors(case, workers.run(sharded_results, 2, case), expected)
        dense = errors(case, [reference_results(case, dtype)], expected)
        for index, name in enumerate(["loss", "hidden", "head", "embedding"]):
            means["sharded"][index] += sharded[name] / 6
            means["dense"][index] += dense[name] / 6
    assert (means["sharded"] <= means["dense"] * 1.1 + 1e-4).all(), means


def test_loss_without_autograd_leaves_accumulators_unchanged() -> None:
    """Compute the loss as evaluation does: it has no gradient, and nothing is added to the shard's accumulator."""
    head, hidden, targets = distant_logits()
    shard = VocabularyShard(head, 0, torch.zeros_like(head))
    sequence = torch.zeros(1, dtype=torch.int64)
    loss_batch = LossBatch(targets, torch.tensor([3]), sequence, sequence, sequence)
    with torch.no_grad():
        result = solar_loss(
            hidden.requires_grad_(),
            loss_batch,
            Vocabulary(8, shard, shard),
            LossSettings(),
            1.0,
            LossNormalizers(3.0, 0.0),
            1,
        )
    assert not result.loss.requires_grad
    assert shard.grad is not None and not shard.grad.any()


@pytest.mark.parametrize("what", ["weight", "tokens", "target", "pivot"])
def test_loss_bounds_detect_small_changes(workers: Workers, what: str) -> None:
    """Check that a change of a factor by one part in 10^5, or of one index, exceeds the bounds."""
    case = Case(UNEVEN[:2], tied=False)
    changed = {
        "weight": replace(case, weight=case.weight * (1 + 1e-5)),
        "tokens": replace(case, lengths=(((3, 2, 5), (4,), (1, 4)), ((7, 1),))),
        "target": replace(case, seed=1),
        "pivot": replace(case, settings=LossSettings(detach=())),
    }[what]
    parts = workers.run(sharded_results, 2, case)
    reference = reference_results(changed)
    if what in ("weight", "pivot"):
        assert errors(case, parts, reference)["hidden"] > FP32
    else:
        assert abs(float(parts[0]["loss"]) - float(reference["loss"])) > FP32


def raised_softmax_(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Do what the GPU kernel may do: leave the exponentials larger than 1, here by e^38."""
    log_sum, total = kernels.softmax_(z, *args)
    z.mul_(math.exp(38))
    return log_sum, total * math.exp(38)


def distant_target_gradients(group: Group, raised: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden states and shard for `distant_logits`, with `raised_softmax_` or the CPU's own.

    Rank 0 has one sequence of 3 target tokens. Their ids are on rank 1, with logits 150 below the largest on rank 0.
    """
    rank, _ = rank_and_size(group)
    head, hidden, targets = distant_logits()
    count = 3 if rank == 0 else 0
    own = hidden[:count].requires_grad_()
    sequences = torch.zeros(1 if rank == 0 else 0, dtype=torch.int64)
    loss_batch = LossBatch(targets[:count], torch.full_like(sequences, 3), sequences, sequences, sequences)
    shard = VocabularyShard(head[4 * rank : 4 * rank + 4], 4 * rank, torch.zeros(4, 2))
    settings, vocabulary = LossSettings(head="vocab_parallel"), Vocabulary(8, shard, shard)
    with patch("pipeline.loss.softmax.softmax_", raised_softmax_ if raised else kernels.softmax_):
        result = solar_loss(own, loss_batch, vocabulary, settings, 1.0, LossNormalizers(3.0, 0.0), 1, None, group)
    result.loss.backward()
    assert own.grad is not None and shard.grad is not None
    return own.grad, shard.grad


def distant_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Return head [8, 2], hidden states [3, 2] and targets [3]."""
    head = torch.tensor([[1.0, 0.1 * i] for i in range(4)] + [[-1.0, 0.1 * i] for i in range(4)])
    return head, torch.tensor([[75.0, 1.0], [75.0, -2.0], [75.0, 0.5]]), torch.tensor([4, 6, 7])


@pytest.mark.parametrize("raised", [False, True])
def test_loss_target_far_below_logits_of_other_rank(workers: Workers, raised: bool) -> None:
    """Check gradients at targets of which the target's rank holds a fraction of the probability below fp32's range."""
    (grad_hidden, grad_first), (_, grad_second) = workers.run(distant_target_gradients, 2, raised)
    head, hidden, targets = distant_logits()
    head.requires_grad_()
    hidden.requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ head.T, targets).backward()
    torch.testing.assert_close(grad_hidden, hidden.grad)
    torch.testing.assert_close(torch.cat([grad_first, grad_second]), head.grad)

"""Compare the selection of the k largest logits with a stable sort, and the loss with the dense reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loss import LossSettings
from pipeline.loss.chunking import BufferSizes
from pipeline.loss.top_k import BLOCK, largest_logits
from pipeline.loss.traffic import Traffic
from tests.pipeline.loss.cases import Case, errors, metric_errors, reference_results, sharded_results
from tests.workers import Workers

LENGTHS = (((3, 2, 5), (4,), (1, 3)), ((7, 1),), ((2, 2, 2, 2), (6, 5)), ((1, 1), (9, 4)))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(0, 12 * BLOCK),
    k=st.sampled_from([1, 2, 5, 20, 400]),
    distinct=st.sampled_from([1, 3, 30, 10000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_largest_logits_equal_stable_sort(
    rows: int, columns: int, k: int, distinct: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(0, distinct, (rows, columns), generator=generator).to(dtype)
    values, selected = largest_logits(z, k)
    expected = z.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(selected, expected.indices[:, :k])


@pytest.mark.parametrize("head", ["vocab_parallel", "gathered"])
@pytest.mark.parametrize("k", [1, 2, 20])
def test_loss_with_ties_between_shards_and_blocks(workers: Workers, k: int, head: str) -> None:
    """Use shards of several blocks whose largest logits are exactly equal, within a rank and between ranks."""
    case = Case(
        LENGTHS[:3],
        LossSettings(top_k=k, head=head, softmax_temperature=10.0, detach=()),  # type: ignore[arg-type]
        vocab_size=10 * BLOCK + 5,
        padded_size=12 * BLOCK,
        hidden_size=3,
        tied=False,
        dtype=torch.float64,
        ties=True,
    )
    parts, reference = workers.run(sharded_results, 3, case), reference_results(case)
    found = errors(case, parts, reference) | metric_errors(parts, reference)
    assert all(error <= 1e-10 for error in found.values()), found
    # With these logits, the choice among equal ones matters.
    other = reference_results(replace(case, settings=replace(case.settings, top_k=k + 1)))
    assert errors(case, parts, other)["embedding"] > 1e-3


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_top_k_of_whole_vocabulary_equals_full_mixture(workers: Workers, tied: bool) -> None:
    full = Case(LENGTHS, LossSettings(top_k=None, softmax_temperature=0.7), tied=tied, dtype=torch.float64)
    for k in (full.vocab_size, 10 * full.vocab_size):
        case = replace(full, settings=replace(full.settings, top_k=k))
        found = errors(case, workers.run(sharded_results, 4, case), reference_results(full))
        assert all(error <= 1e-12 for error in found.values()), found


def test_soft_token_embeddings_of_tied_model_make_no_difference() -> None:
    inputs, outputs = (
        sharded_results(None, Case(LENGTHS[:1], LossSettings(soft_token_embeddings=matrix), tied=True))  # type: ignore[arg-type]
        for matrix in ("input", "output")
    )
    assert all(torch.equal(inputs[name], outputs[name]) for name in inputs)


@pytest.mark.parametrize("ranks", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("element_size", [2, 4])
def test_selection_receives_at_most_a_tenth_of_a_hidden_state(ranks: int, element_size: int) -> None:
    positions, hidden = 1024 * ranks, 4096
    traffic = Traffic(ranks, 131072, hidden, element_size, positions, 1024, 1, 0, 0, 16 * ranks, 8 * ranks, 20)
    without = replace(traffic, top_k=None)
    added = (traffic.vocab_parallel - without.vocab_parallel) / positions
    assert 0 < added <= 0.1 * hidden * element_size


@pytest.mark.parametrize("ranks", [1, 8])
def test_rows_that_fit_limits_large_top_k(ranks: int) -> None:
    """With k = 20 the logits alone decide. With k above V/R, the lists of a rank are larger than its logits."""
    vocab, size = 152_064, 2
    sizes = BufferSizes(ranks, vocab // ranks, hidden=1, element_size=size, softcap=False, gpu=True)
    fits = {}
    for k in (None, 20, 32_000, vocab):
        settings = LossSettings(top_k=k, memory_budget_mb=256)
        fits[k] = rows = sizes.rows_that_fit(settings, vocab_parallel=True)
        assert rows == fits[None] if k in (None, 20) else rows < fits[None]
        # Per rank: selected logits (twice) and their indices in its columns, and the list that it sends.
        lists = 0 if k is None else ranks * rows * (min(k, vocab // ranks) * (2 * size + 24) + k * size)
        assert lists <= 256 * 2**20

"""Products with the used rows of the embedding, against dense float64 products."""

from dataclasses import replace

import pytest
import torch

from pipeline.loss import LossSettings, embedding_products, kernels
from pipeline.loss.embedding_products import add_gradient_, times_embedding, times_embedding_transposed, used_columns
from tests.pipeline.loss.cases import Case
from tests.pipeline.loss.test_vocab_parallel import FP64, HEADS, UNEVEN, check
from tests.workers import Workers

ROWS, SIZE = 4096, 24


@pytest.mark.parametrize("used", [0, 1, 700, 2047, 2048, ROWS])
def test_products_with_used_rows_equal_dense_products(used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles of 100 rows of the embedding. From half of the columns on, all rows are used."""
    monkeypatch.setattr(kernels, "CACHE_BYTES", 100 * SIZE * 8)
    generator = torch.Generator().manual_seed(used)
    embedding, grad_u = torch.randn(ROWS, SIZE, generator=generator).double(), torch.randn(2, SIZE).double()
    in_use = torch.randperm(ROWS, generator=generator)[:used].sort().values
    pooled = torch.zeros(3, ROWS).double()
    # Each column is used by one of the sequences.
    pooled[torch.arange(used) % 3, in_use] = torch.rand(used, generator=generator).double() + 0.1
    columns = used_columns(pooled)
    assert (columns is None) == (2 * used >= ROWS)
    assert columns is None or torch.equal(columns, in_use)
    for sparse in (False, True):
        u = times_embedding(pooled, embedding, sparse)
        torch.testing.assert_close(u, pooled @ embedding, rtol=1e-12, atol=1e-12)
    expected = grad_u @ embedding.T
    if columns is not None:
        expected = torch.zeros_like(expected).index_copy(1, columns, expected[:, columns])
    actual = times_embedding_transposed(grad_u, embedding, columns)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if columns is not None:
        total = embedding.clone()
        add_gradient_(total, pooled[:2], grad_u, columns, 0.5)
        torch.testing.assert_close(total, embedding + 0.5 * pooled[:2].T @ grad_u, rtol=1e-12, atol=1e-12)


def test_sequences_share_columns_or_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four sequences has no probability, and the others share columns."""
    pooled, embedding = torch.zeros(4, ROWS).double(), torch.randn(ROWS, SIZE).double()
    pooled[0, 5:50] = pooled[2, 40:90] = pooled[3, 5:7] = 0.25
    calls = []
    bag = embedding_products.embedding_bag
    monkeypatch.setattr(embedding_products, "embedding_bag", lambda *a, **k: calls.append(1) or bag(*a, **k))
    for sparse in (True, False):
        u = times_embedding(pooled, embedding, sparse)
        torch.testing.assert_close(u, pooled @ embedding, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1  # the other call reads the whole embedding


def test_no_columns() -> None:
    """Use the shard of a rank without rows of the vocabulary."""
    pooled, embedding = torch.zeros(2, 0), torch.zeros(0, 4)
    columns = used_columns(pooled)
    assert times_embedding(pooled, embedding, sparse=True).tolist() == [[0.0] * 4] * 2
    assert times_embedding_transposed(torch.ones(2, 4), embedding, columns).shape == (2, 0)


def test_half_precision_is_not_rounded_after_every_row() -> None:
    """Sum 1,000 equal terms. In bfloat16, a sum of 32 does not change if 0.1 is added."""
    pooled = torch.zeros(1, ROWS, dtype=torch.bfloat16)
    pooled[0, :1000] = 0.1
    u = times_embedding(pooled, torch.ones(ROWS, 4, dtype=torch.bfloat16), sparse=True)
    torch.testing.assert_close(u.double(), pooled.double() @ torch.ones(ROWS, 4).double(), rtol=2**-8, atol=0.0)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_with_few_used_rows_of_embedding(workers: Workers, tied: bool, ranks: int, parts: int) -> None:
    """Use a vocabulary of which the soft tokens and the targets use less than half, and vocabulary weights."""
    for loss_settings in (LossSettings(top_k=4, detach=()), LossSettings(pooling_tokens="hard")):
        for head, rows in ((HEADS[0], 3), (HEADS[1], 100)):
            settings = replace(loss_settings, head=head)
            case = Case(UNEVEN, settings, vocab_size=1000, padded_size=1008, tied=tied, vocabulary_weights=True)
            case = replace(case, parts=parts, dtype=torch.float64)
            check(workers, ranks, case.with_rows(rows), FP64)

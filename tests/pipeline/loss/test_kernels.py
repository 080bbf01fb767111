"""Check the operations on logits whose rows are padded, and the memory budget that counts the padding."""

import pytest
import torch

from pipeline.loss import LossSettings, Vocabulary, VocabularyShard
from pipeline.loss.chunking import HIDDEN_TENSORS, BufferSizes
from pipeline.loss.kernels import row_stride, softmax_
from pipeline.loss.softmax import ShardedSoftmax
from pipeline.loss.top_k import BLOCK, largest_logits


def padded(rows: torch.Tensor) -> torch.Tensor:
    """Copy rows into a buffer with padding of NaN."""
    buffer = torch.full((len(rows), row_stride(rows.shape[1], gpu=False)), torch.nan, dtype=rows.dtype)
    buffer[:, : rows.shape[1]] = rows
    return buffer[:, : rows.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("columns", [BLOCK * 4 + 3, 4096 * 3, 4096 * 3 + 1])
def test_softmax_and_selection_of_padded_rows(columns: int, rows: int, dtype: torch.dtype) -> None:
    """Compare padded with contiguous rows: bit for bit, except for the order in which the softmax adds in fp32."""
    plain = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    for actual, expected in zip(largest_logits(padded(plain), 3), largest_logits(plain, 3), strict=True):
        assert torch.equal(actual, expected)
    logits = padded(plain)
    tolerance = 1e-6 if dtype == torch.float32 else 0
    for actual, expected in zip(softmax_(logits, 1.0), softmax_(plain, 1.0), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(logits, plain, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("columns", "on_cpu", "on_gpu"), [(1187, 1216, 1216), (1024, 1088, 1024), (1984, 1984, 1984)])
def test_row_stride(columns: int, on_cpu: int, on_gpu: int) -> None:
    """Rows are aligned to 64 elements. On a CPU their distance is no multiple of 1,024 elements."""
    assert (row_stride(columns, gpu=False), row_stride(columns, gpu=True)) == (on_cpu, on_gpu)


@pytest.mark.parametrize("columns", [594, 1187, 1188, 1192])
def test_rows_of_gradients_are_aligned(columns: int) -> None:
    """Use shards of Qwen2.5 0.5B and 7B on 128 and 256 ranks. Only 1192 is a multiple of 8."""
    shard = VocabularyShard(torch.randn(columns, 4).bfloat16(), 0)
    softmax = ShardedSoftmax(Vocabulary(columns, shard, shard), 1.0, 20, None, hard=False, alignment_factor=1.0)
    grad_u = torch.randn(3, 4)
    grad_probs = softmax.grad_probs(grad_u, None)
    torch.testing.assert_close(grad_probs, grad_u.bfloat16() @ shard.weight.T)
    assert all(row.data_ptr() % 16 == 0 for row in grad_probs)


def test_memory_budget_counts_padding_of_every_shard() -> None:
    """A rank with fewer rows of the vocabulary, or none, fits the same number of target tokens as all others."""
    settings = LossSettings(memory_budget_mb=64)
    fit = set()
    for rows in (1187, 500, 0):
        shard = VocabularyShard(torch.zeros(rows, 4).bfloat16(), 0)
        vocabulary = Vocabulary(151_000, shard, shard, padded_size=1187 * 128)
        fit.add(BufferSizes.of(vocabulary, 128).rows_that_fit(settings, True))
    assert fit == {64 * 2**20 // (128 * (1216 + HIDDEN_TENSORS * 4) * 2)}

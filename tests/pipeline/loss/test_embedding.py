"""Compare the sharded embedding lookup with torch's, in float64 and half precisions, on 1 to 4 ranks."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from pipeline.loss import VocabularyShard, embedding_lookup, vocabulary_range
from pipeline.loss.comm import Group, rank_and_size
from tests.workers import Workers

VOCAB, PADDED, HIDDEN, FACTOR = 37, 48, 5, 0.25

SHAPES = {
    "uneven": [(2, 7), (3,), (4, 2, 2), (1,)],
    "one rank empty": [(5,), (0,), (2, 3), (0, 4)],
    "nothing": [(0,), (0,), (0,), (0,)],
    "duplicates": [(300,), (200,), (2, 100), (1,)],
}


def random_inputs(shapes: list[tuple[int, ...]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Draw a table [V, d], and for each rank its ids and the gradient of its rows."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    ids = [torch.randint(0, VOCAB, shape, generator=generator) for shape in shapes]
    grads = [torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64) for shape in shapes]
    return table, ids, grads


def look_up(
    group: Group, shapes: list[tuple[int, ...]], dtype: torch.dtype, checkpointed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return this rank's rows, and the gradient of its shard after two passes over them."""
    rank, size = rank_and_size(group)
    table, ids, grads = random_inputs(shapes)
    start, end = vocabulary_range(VOCAB, PADDED, rank, size)
    weight = table[start:end].to(dtype)
    shard = VocabularyShard(weight, start, torch.zeros(weight.shape, dtype=torch.promote_types(dtype, torch.float32)))
    rows = embedding_lookup(ids[rank], shard, PADDED, group, FACTOR)
    assert rows.requires_grad
    result = rows.detach().clone()
    for _ in range(2):
        rows = embedding_lookup(ids[rank], shard, PADDED, group, FACTOR)
        if checkpointed:
            rows = torch.utils.checkpoint.checkpoint(torch.mul, rows, torch.ones(()), use_reentrant=True)
        rows.backward(grads[rank].to(dtype))
    assert shard.grad is not None
    return result, shard.grad


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_embedding_lookup_equals_torch(workers: Workers, name: str, ranks: int) -> None:
    shapes = SHAPES[name][:ranks]
    parts = workers.run(look_up, ranks, shapes, torch.float64)
    table, ids, grads = random_inputs(shapes)
    table.requires_grad_()
    for (rows, _), own in zip(parts, ids, strict=True):
        assert torch.equal(rows, embedding(own, table))
    for own, grad in zip(ids, grads, strict=True):
        embedding(own, table).backward(2 * FACTOR * grad)
    expected = torch.zeros_like(table) if table.grad is None else table.grad
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding_lookup_sums_half_precision_in_fp32(workers: Workers, dtype: torch.dtype) -> None:
    """Check a sum over about 20 tokens per id. In bf16 it would be off by more than 1e-3."""
    shapes = SHAPES["duplicates"]
    actual = torch.cat([grad for _, grad in workers.run(look_up, 4, shapes, dtype)])
    assert actual.dtype == torch.float32
    table, ids, grads = random_inputs(shapes)
    expected = torch.zeros_like(table)
    for own, grad in zip(ids, grads, strict=True):
        expected.index_add_(0, own.flatten(), grad.to(dtype).double().view(-1, HIDDEN), alpha=2 * FACTOR)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)


def test_embedding_lookup_under_activation_checkpointing(workers: Workers) -> None:
    plain, checkpointed = (workers.run(look_up, 2, SHAPES["uneven"][:2], torch.float32, on) for on in (False, True))
    for (_, a), (_, b) in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_embedding_lookup_without_accumulator_or_autograd() -> None:
    shard = VocabularyShard(torch.randn(VOCAB, HIDDEN), 0)
    embedding_lookup(torch.tensor([1, 1]), shard, VOCAB, None, 1.0).sum().backward()
    with torch.no_grad():
        assert not embedding_lookup(torch.tensor([1, 1]), shard, VOCAB, None, 1.0).requires_grad


@pytest.mark.parametrize("ids", [[0, PADDED], [-1, 3]])
def test_embedding_lookup_rejects_ids_outside_vocabulary(ids: list[int]) -> None:
    shard = VocabularyShard(torch.randn(VOCAB, HIDDEN), 0)
    with pytest.raises(ValueError, match=f"token ids {ids[0]} to {ids[1]}"):
        embedding_lookup(torch.tensor(ids), shard, PADDED, None, 1.0)

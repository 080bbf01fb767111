"""The data loader: an order independent of the number of ranks, exact resume, and the layout of target tokens."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data_prep.shards.format import PIVOT, ShardSet
from pipeline.data.loader import BatchSplit, Loader, epoch_order, row_weights
from pipeline.data.micro_batch import MicroBatch, collate, local_normalizers
from pipeline.data.sequential_loader import SequentialLoader
from tests.conftest import Prepared


@pytest.fixture
def shards(prepared: Prepared) -> ShardSet:
    return ShardSet.open(prepared.shards)


def loader(shards: ShardSet, rank: int = 0, ranks: int = 1, micro: int = 1, seed: int = 5) -> Loader:
    return Loader(shards, BatchSplit(4, micro, rank, ranks), seed, 0, None)


def contents(micro_batches: list[MicroBatch]) -> Iterator[tuple[int, ...]]:
    for batch in micro_batches:
        for row in batch.input_ids:
            yield tuple(row[row.nonzero().squeeze(1)].tolist())


def test_loader_global_batches_independent_of_ranks(shards: ShardSet) -> None:
    for step_count in range(3 * len(shards) // 4 // 2):
        alone = loader(shards)
        alone.consumed = 4 * step_count
        expected = sorted(contents(alone.next()))
        for ranks, micro in ((2, 1), (2, 2), (4, 1)):
            got: list[tuple[int, ...]] = []
            for rank in range(ranks):
                one = loader(shards, rank, ranks, micro)
                one.consumed = 4 * step_count
                got += contents(one.next())
            assert sorted(got) == expected


def test_loader_epoch_order(shards: ShardSet) -> None:
    whole = loader(shards)
    rows = [row for _ in range(2 * len(shards)) for row in contents(whole.next())][: 2 * len(shards)]
    first, second = rows[: len(shards)], rows[len(shards) :]
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first) == sorted(tuple(row.input_ids.tolist()) for row in shards)


def test_loader_resumes_mid_epoch(shards: ShardSet) -> None:
    whole, broken = loader(shards), loader(shards)
    expected = [list(contents(whole.next())) for _ in range(9)]
    got = [list(contents(broken.next())) for _ in range(4)]
    fresh = loader(shards, seed=99)
    fresh.load_state_dict(broken.state_dict())
    got += [list(contents(fresh.next())) for _ in range(5)]
    assert got == expected
    assert broken.state_dict() == {"consumed": 16, "seed": 5}


def test_sequential_loader_reads_each_row_once(shards: ShardSet) -> None:
    """With 1 to 4 ranks and any micro-batch size, all ranks have as many micro-batches and none repeats a row."""
    languages = shards.manifest["languages"]
    counts = local_normalizers([collate(list(shards), languages, 0)])
    for ranks, micro in ((1, 1), (2, 3), (3, 4), (4, 100)):
        loaders = [SequentialLoader(shards, languages, BatchSplit(4, micro, rank, ranks), 0) for rank in range(ranks)]
        batches = [list(loader) for loader in loaders]
        assert {len(part) for part in batches} == {len(loaders[0])}
        everything = [batch for part in batches for batch in part]
        rows = [row for row in contents(everything) if row]
        assert sorted(rows) == sorted(tuple(row.input_ids.tolist()) for row in shards)
        total = local_normalizers(everything)
        assert total.pairs == counts.pairs and total.tokens == pytest.approx(counts.tokens, rel=1e-12)


def test_collate_positions_predict_labels(shards: ShardSet) -> None:
    rows = [shards[0], shards[1]]
    batch = collate(rows, shards.manifest["languages"], pad_token_id=0)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.positions + 1], batch.loss_batch.targets)
    labels = np.concatenate([row.labels for row in rows])
    assert len(batch.positions) == (labels != -100).sum() == int(batch.loss_batch.lengths.sum())
    for b, row in enumerate(rows):
        begin = 0
        for length in row.seq_lens:
            assert batch.position_ids[b, begin : begin + length].tolist() == list(range(length))
            begin += length
        assert not batch.position_ids[b, begin:].any()
    assert len({len(row.input_ids) for row in rows}) > 1  # so one has padding
    pivots = [i for i, role in enumerate(rows[0].role + rows[1].role) if role == PIVOT]
    assert sorted(set(batch.loss_batch.pivot.tolist())) == pivots
    assert local_normalizers([batch]).pairs == sum(role != PIVOT for row in rows for role in row.role)
    names = [name for row in rows for name in row.pair_id]
    same = [names[int(p)] == name for p, name in zip(batch.loss_batch.pivot, names, strict=True)]
    assert all(same)


def test_epoch_order_follows_language_weights(shards: ShardSet) -> None:
    weights = row_weights(shards, {"sw": 5.0, "th": 3.0})
    assert weights is not None
    row = shards[0]
    by_hand = sum({"sw": 5.0, "th": 3.0}.get(lang, 1.0) * n for lang, n in zip(row.lang, row.seq_lens, strict=True))
    assert weights[0] == pytest.approx(by_hand / len(row.input_ids))
    expected = weights / weights.sum() * len(shards)
    for epoch in range(20):
        counts = np.bincount(epoch_order(len(shards), weights, 5, epoch), minlength=len(shards))
        assert counts.sum() == len(shards)
        assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    assert (epoch_order(9, None, 5, 0) != epoch_order(9, None, 5, 1)).any()
    assert row_weights(shards, {}) is None

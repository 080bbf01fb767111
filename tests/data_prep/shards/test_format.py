"""Shards are read as they were written, with few decoded row groups in memory."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.shards.format import CACHED_GROUPS, MANIFEST, ROW_GROUP, PackedRow, ShardSet, shard_name, write_shard
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError


def row(number: int) -> PackedRow:
    ids = np.arange(number, number + 6, dtype=np.int32)
    labels = np.array([-100, *ids[1:3], -100, *ids[4:]], np.int32)
    return PackedRow(
        ids, labels, np.array([3, 3], np.int32), [f"p{number}"] * 2, ["en", "sw"], ["pivot", "translation"]
    )


@pytest.fixture
def directory(tmp_path):
    """Write a shard directory of two shards with 40 rows each."""
    entries = [
        write_shard(tmp_path / shard_name(shard), [row(40 * shard + i) for i in range(40)]) for shard in range(2)
    ]
    write_json(tmp_path / MANIFEST, {"format_version": 1, "shards": entries})
    return tmp_path


def test_shard_set_reads_rows_in_any_order(directory):
    shards = ShardSet.open(directory)
    assert len(shards) == 80
    for number in [79, 0, 40, 39, ROW_GROUP, ROW_GROUP - 1, 5]:
        actual, expected = shards[number], row(number)
        for name in ("input_ids", "labels", "seq_lens"):
            array = getattr(actual, name)
            assert array.dtype == np.int32 and array.tolist() == getattr(expected, name).tolist()
        assert (actual.pair_id, actual.lang, actual.role) == (expected.pair_id, expected.lang, expected.role)
    with pytest.raises(IndexError):
        shards[80]


def test_write_shard_counts_rows(directory):
    entry = json.loads((directory / MANIFEST).read_text())["shards"][0]
    counts = {key: entry[key] for key in ("rows", "tokens", "supervised_tokens", "sequences", "pairs")}
    assert counts == {"rows": 40, "tokens": 240, "supervised_tokens": 160, "sequences": 80, "pairs": 40}


def test_write_shard_is_reproducible(directory, tmp_path):
    write_shard(tmp_path / "again.parquet", [row(i) for i in range(40)])
    assert (tmp_path / "again.parquet").read_bytes() == (directory / shard_name(0)).read_bytes()
    assert not list(directory.glob("*.tmp"))


def test_shard_set_caches_recent_row_groups(tmp_path, monkeypatch):
    groups = CACHED_GROUPS + 1
    entry = write_shard(tmp_path / shard_name(0), [row(i) for i in range(groups * ROW_GROUP)])
    write_json(tmp_path / MANIFEST, {"format_version": 1, "shards": [entry]})
    decoded = []
    original = pq.ParquetFile.read_row_group

    def read_row_group(self, group, *args, **kwargs):
        decoded.append(group)
        return original(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    shards = ShardSet.open(tmp_path)
    assert [int(packed.input_ids[0]) for packed in shards] == list(range(groups * ROW_GROUP))
    assert decoded == list(range(groups))  # each once
    for group in (2, 1, 0, 1):  # reading group 0, the only one not in memory, evicts group 3
        assert shards[group * ROW_GROUP].input_ids[0] == group * ROW_GROUP
    assert decoded[groups:] == [0]
    assert shards[3 * ROW_GROUP].input_ids[0] == 3 * ROW_GROUP
    assert decoded[groups:] == [0, 3]


def test_threads_share_a_shard_set(tmp_path):
    number = (CACHED_GROUPS + 8) * ROW_GROUP  # more than fit in memory, so that all threads decode all the time
    entry = write_shard(tmp_path / shard_name(0), [row(i) for i in range(number)])
    shards = ShardSet(tmp_path, {"shards": [entry]})

    def read(seed: int) -> bool:
        indices = random.Random(seed).choices(range(number), k=400)
        return all(shards[i].pair_id == row(i).pair_id for i in indices)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), "not a shard directory"),
        (lambda d: (d / MANIFEST).write_text("{"), "damaged manifest"),
        (lambda d: write_json(d / MANIFEST, {"format_version": 2, "shards": []}), "format_version 2"),
        (lambda d: (d / shard_name(1)).unlink(), "missing shard"),
        (lambda d: (d / shard_name(1)).write_bytes(b"x"), "bytes differ"),
    ],
)
def test_shard_set_rejects_damaged_directory(directory, damage, message):
    damage(directory)
    with pytest.raises(UserError, match=message):
        ShardSet.open(directory)


def test_shard_set_rejects_missing_directory(tmp_path):
    with pytest.raises(UserError, match="no such shard directory"):
        ShardSet.open(tmp_path / "none")

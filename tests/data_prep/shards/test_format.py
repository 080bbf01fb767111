import json

import numpy as np
import pytest

from data_prep.shards.format import MANIFEST, ROW_GROUP, PackedRow, ShardSet, shard_name, write_shard
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
    """Two shards of 40 rows each."""
    entries = [
        write_shard(tmp_path / shard_name(shard), [row(40 * shard + i) for i in range(40)]) for shard in range(2)
    ]
    write_json(tmp_path / MANIFEST, {"format_version": 1, "shards": entries})
    return tmp_path


def test_reads_back_what_was_written_in_any_order(directory):
    shards = ShardSet.open(directory)
    assert len(shards) == 80
    for number in [79, 0, 40, 39, ROW_GROUP, ROW_GROUP - 1, 5]:
        found, expected = shards[number], row(number)
        for name in ("input_ids", "labels", "seq_lens"):
            array = getattr(found, name)
            assert array.dtype == np.int32 and array.tolist() == getattr(expected, name).tolist()
        assert (found.pair_id, found.lang, found.role) == (expected.pair_id, expected.lang, expected.role)
    with pytest.raises(IndexError):
        shards[80]


def test_entry_counts(directory):
    entry = json.loads((directory / MANIFEST).read_text())["shards"][0]
    counts = {key: entry[key] for key in ("rows", "tokens", "supervised_tokens", "sequences", "pairs")}
    assert counts == {"rows": 40, "tokens": 240, "supervised_tokens": 160, "sequences": 80, "pairs": 40}


def test_same_rows_same_bytes(directory, tmp_path):
    write_shard(tmp_path / "again.parquet", [row(i) for i in range(40)])
    assert (tmp_path / "again.parquet").read_bytes() == (directory / shard_name(0)).read_bytes()
    assert not list(directory.glob("*.tmp"))


def test_keeps_few_row_groups_in_memory(directory):
    shards = ShardSet.open(directory)
    shards._cached_groups = 2
    assert [int(found.input_ids[0]) for found in shards] == list(range(80))
    assert len(shards._groups) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), "not a shard directory"),
        (lambda d: (d / MANIFEST).write_text("{"), "damaged manifest"),
        (lambda d: write_json(d / MANIFEST, {"format_version": 2, "shards": []}), "format_version 2"),
        (lambda d: (d / shard_name(1)).unlink(), "missing shard"),
        (lambda d: (d / shard_name(1)).write_bytes(b"x"), "bytes differ"),
    ],
)
def test_damaged_directories_are_refused(directory, break_it, message):
    break_it(directory)
    with pytest.raises(UserError, match=message):
        ShardSet.open(directory)


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such shard directory"):
        ShardSet.open(tmp_path / "none")

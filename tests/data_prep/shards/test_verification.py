"""Verification finds errors that the hashes of the shards do not reveal."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from data_prep.shards.format import MANIFEST, PackedRow, shard_name, write_manifest, write_shard
from data_prep.shards.repeated_pivots import RepeatedPivots, count_repeated_pivots
from data_prep.shards.verification import verify
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError

HEAD = {"format_version": 1, "max_seq_length": 8, "pivot": "en", "tokenizer": {"vocab_size": 20}}
IDS = np.arange(10, 16, dtype=np.int32)
LABELS = np.array([-100, 11, 12, -100, 14, 15], np.int32)
GOOD = PackedRow(IDS, LABELS, np.array([3, 3], np.int32), ["p", "p"], ["en", "sw"], ["pivot", "translation"])


def write_directory(path, *rows, **head):
    """Write a shard directory of one shard."""
    per_language: dict[str, Counter] = {}
    for row in rows:
        for lang, labels in zip(row.lang, np.split(row.labels, np.cumsum(row.seq_lens)[:-1]), strict=False):
            numbers = {"sequences": 1, "tokens": len(labels), "supervised_tokens": int((labels != -100).sum())}
            per_language.setdefault(lang, Counter()).update(numbers)
    write_manifest(path, {**HEAD, **head}, [write_shard(path / shard_name(0), rows)], per_language, {})
    return path


def test_verify_accepts_valid_directory(tmp_path):
    split_group = dataclasses.replace(GOOD, lang=["en", "en"], role=["pivot", "pivot"])  # its pivot is repeated
    assert len(verify(write_directory(tmp_path, GOOD, split_group))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:5]}, "disagree in length"),
        ({"lang": ["en"]}, "disagree in length"),
        ({"input_ids": IDS + 5, "labels": np.where(LABELS < 0, LABELS, LABELS + 5)}, "outside the vocabulary"),
        ({"labels": np.where(LABELS == 12, 13, LABELS)}, "neither its token nor -100"),
        ({"labels": np.where(LABELS < 0, IDS, LABELS)}, "supervised first token"),
        ({"labels": np.where(LABELS > 13, -100, LABELS)}, "without a supervised token"),
        ({"role": ["pivot", "pivot"]}, "role pivot for language sw"),
        ({"pair_id": ["p", "q"]}, "does not follow its pivot"),
    ],
)
def test_verify_names_row_with_error(change, message, tmp_path):
    directory = write_directory(tmp_path, GOOD, dataclasses.replace(GOOD, **change))
    with pytest.raises(UserError, match=f"{shard_name(0)} row 2: .*{message}"):
        verify(directory)


def test_verify_rejects_repeated_language(tmp_path):
    row = PackedRow(
        np.tile(IDS[:3], 3),
        np.tile(LABELS[:3], 3),
        np.array([3, 3, 3], np.int32),
        ["p"] * 3,
        ["en", "sw", "sw"],
        ["pivot", "translation", "translation"],
    )
    with pytest.raises(UserError, match="language sw twice in group p"):
        verify(write_directory(tmp_path, row, max_seq_length=9))


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ([[2, 1], [2, 1], [1, 1]], None),
        ([[2, 1], [3, 1], [1, 1]], "pivot of pair_id p is recorded with 3 copies, but has 2"),
        ([[1, 1], [2, 1], [1, 1]], "pivot of pair_id p is recorded with 1 copies, but has 2"),
        ([[2, 1], [2, 1], [2, 1]], "pivot of pair_id q is recorded with 2 copies, but has 1"),
        ([[2, 1], [2, 2], [1, 1]], f"{shard_name(0)} row 2: a translation with several copies"),
        ([[2, 1], [2], [1, 1]], f"{shard_name(0)} row 2: seq_lens and copies disagree in length"),
    ],
)
def test_verify_checks_recorded_copies(recorded, message, tmp_path):
    other = dataclasses.replace(GOOD, pair_id=["q", "q"])
    rows = [
        dataclasses.replace(row, copies=np.array(copies, np.int32))
        for row, copies in zip([GOOD, GOOD, other], recorded, strict=True)
    ]
    directory = write_directory(tmp_path, *rows)
    if message is None:
        assert [row.copies.tolist() for row in verify(directory)] == recorded
    else:
        with pytest.raises(UserError, match=message):
            verify(directory)


@pytest.mark.parametrize("recorded", [True, False])
def test_count_repeated_pivots_on_split_group(recorded, tmp_path):
    other = dataclasses.replace(GOOD, pair_id=["q", "q"], labels=np.where(LABELS == 12, -100, LABELS))
    rows = [GOOD, other, GOOD]
    if recorded:
        rows = [
            dataclasses.replace(row, copies=np.array(copies, np.int32))
            for row, copies in zip(rows, [[2, 1], [1, 1], [2, 1]], strict=True)
        ]
    result = count_repeated_pivots(verify(write_directory(tmp_path, *rows)))
    # Rows 1 and 3 have two target tokens of the pivot each, and all rows together have 11.
    assert result == RepeatedPivots(pivots=1, copies=2, target_fraction=4 / 11, recorded=recorded)
    assert "repeated pivots: 1 of split groups, in 2 copies with 36.4% of the target tokens" in str(result)
    assert str(result).endswith("pack again") is not recorded


def test_verify_rejects_row_longer_than_manifest_allows(tmp_path):
    with pytest.raises(UserError, match=f"{shard_name(0)} row 1: 6 tokens, more than max_seq_length 5"):
        verify(write_directory(tmp_path, GOOD, max_seq_length=5))


@pytest.mark.parametrize("name", ["tokens", "supervised_tokens", "sequences", "pairs"])
def test_verify_rejects_count_that_differs_from_manifest(name, tmp_path):
    write_directory(tmp_path, GOOD)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["shards"][0][name] += 1
    write_json(tmp_path / MANIFEST, manifest)
    actual = manifest["shards"][0][name] - 1
    with pytest.raises(UserError, match=f"{shard_name(0)}: {actual} {name}, but {actual + 1} in the manifest"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["totals"].update(pairs=0), "1 pairs, but 0 in `totals`"),
        (lambda manifest: manifest["per_language"]["sw"].update(tokens=9), "3 tokens in sw, but 9 in `per_language`"),
        (lambda manifest: manifest["per_language"].pop("en"), "1 sequences in en, but None in `per_language`"),
    ],
)
def test_verify_rejects_totals_that_differ_from_shards(change, message, tmp_path):
    write_directory(tmp_path, GOOD)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    change(manifest)
    write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(UserError, match=f"{MANIFEST}: {message}; pack again"):
        verify(tmp_path)

"""Input files are read completely in any splits, and errors name file and row."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.readers import InputSplit, locate, read_file, read_lines, read_split, split_inputs
from pipeline.common.errors import StorageError, UserError


def read(path, split_bytes):
    return [row for split in split_inputs([path], split_bytes) for row in read_split(split)]


@pytest.mark.parametrize("split_bytes", [1, 7, 64, 1000])
def test_read_split_yields_every_line_once(split_bytes, tmp_path):
    path = tmp_path / "a.jsonl"
    values = [{"number": i, "text": "é" * (i % 9)} for i in range(50)]
    path.write_text("\ufeff" + "\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n\n", "utf-8")
    rows = read(path, split_bytes)
    assert [row.value for row in rows] == values
    assert [row[:3] for row in rows] == [row[:3] for row in read_file(path)]


def test_failed_read_is_one_line_and_not_a_damaged_file(tmp_path, monkeypatch):
    """Reading /proc/self/mem at 0 fails with EIO, as does a broken disk."""
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **kwargs: Path("/proc/self/mem").read_bytes())
    for path in (Path("/proc/self/mem"), tmp_path / "a.parquet"):
        with pytest.raises(StorageError, match=f"^cannot read {path}: Input/output error; check the file system and"):
            list(read_file(path))


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[" * 100_000, b"nul"])
def test_read_split_names_row_of_bad_line(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"^{path} row 3: (malformed JSON|not UTF-8 text)"):
        read(path, 16)


def test_locate_counts_rows_from_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n\n22\n")
    assert [row.location for row in read_file(path)] == [f"{path} row 1", f"{path} row 3"]
    assert [row.number for row in read_file(path)] == [1, 3]  # so that locating all rows reads the file once
    assert [locate(path, row.position) for row in read_file(path)] == [f"{path} row 1", f"{path} row 3"]
    assert locate(tmp_path / "a.parquet", 4) == f"{tmp_path / 'a.parquet'} row 5"


def test_read_split_reads_parquet_by_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": i, "b": None} for i in range(10)]), path, row_group_size=3)
    splits = split_inputs([path])
    assert [split.start for split in splits] == [0, 3, 6, 9]
    rows = list(read_split(splits[1]))
    assert [row.value for row in rows] == [{"a": i, "b": None} for i in (3, 4, 5)]
    assert [row.location for row in rows] == [f"{path} row {i}" for i in (4, 5, 6)]
    assert [row.position for row in read_file(path)] == list(range(10))


@pytest.mark.parametrize(("split_bytes", "number"), [(1, 64 + 10 + 64), (1_000_000, 3)])
def test_split_inputs_divides_large_row_groups(split_bytes, number, tmp_path):
    """pandas writes up to a million rows in one row group, which one rank would tokenize and hold in memory."""
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("a", pa.int64()), ("text", pa.string())])) as writer:
        for first, stop in ((0, 2500), (2500, 2510), (2510, 4000)):
            rows = [{"a": i, "text": f"{i * i} apples"} for i in range(first, stop)]
            writer.write_table(pa.Table.from_pylist(rows, writer.schema), row_group_size=5000)
    splits = split_inputs([path], split_bytes)
    assert len(splits) == number
    rows = [row for split in splits for row in read_split(split)]
    assert [(row.position, row.value["a"]) for row in rows] == [(i, i) for i in range(4000)]


def test_read_file_removes_keys_that_arrow_adds_to_structs(tmp_path):
    tools = [
        {"name": "f", "properties": {"x": {"type": "string"}}},
        {"name": "g", "properties": {"y": {"type": "int"}}},
    ]
    pq.write_table(pa.Table.from_pylist([{"tools": tools, "gold": None}]), tmp_path / "a.parquet")
    assert [row.value for row in read_file(tmp_path / "a.parquet")] == [{"tools": tools, "gold": None}]


def test_read_file_names_parquet_row_that_is_not_utf8(tmp_path):
    texts = pa.array([b"a", b"\xc3\xa9", b"\xe9", b"d"]).view(pa.string())
    pq.write_table(pa.table({"answer": texts}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(UserError, match=r"a\.parquet row 3: not valid UTF-8"):
        list(read_file(tmp_path / "a.parquet"))


def test_split_inputs_rejects_parquet_without_rows(tmp_path):
    pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("a", pa.int64())])).close()
    with pytest.raises(UserError, match=r"a\.parquet: no rows"):
        split_inputs([tmp_path / "a.parquet"])


def test_split_inputs_covers_file_by_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 25)
    assert split_inputs([path], 10) == [InputSplit(path, 0, 8), InputSplit(path, 8, 16), InputSplit(path, 16, 25)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "empty file"),
        ("a.parquet", b"PAR1 no", "not a Parquet file"),
        ("a.json", b'\xef\xbb\xbf [\n{"pair_id": 1}]', "a JSON array; first run: .* convert"),
        ("a.csv", b"pair_id,lang\n", "a CSV file; first run: .* convert"),
        ("a.jsonl.gz", b"\x1f\x8b\x08 rest", "a file compressed by gzip or zstd; decompress it first"),
    ],
)
def test_split_inputs_rejects_unreadable_file(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        split_inputs([path])


def test_split_inputs_rejects_folder(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: a folder; give its files, or first run: .* convert"):
        split_inputs([tmp_path])


def test_lines_of_a_compressed_file_are_refused(tmp_path):
    """zstd, by its magic number, and through the reader of `convert`, which takes no splits."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest of a frame")
    with pytest.raises(UserError, match="compressed by gzip or zstd"):
        list(read_lines(path))


def test_byte_order_mark_within_a_file_is_named(tmp_path):
    """Editors do not show it, and concatenated files have one on a later line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"pair_id": 1}\n\xef\xbb\xbf{"pair_id": 2}\n')
    with pytest.raises(UserError, match=r"row 2: malformed JSON \(it begins with a byte order mark"):
        list(read_file(path))


def test_small_parquet_row_group_is_one_split(tmp_path):
    """Each part of a row group is read by decoding the row group up to its end."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"answer": [f"{number} " * 20 for number in range(4000)]}), path, use_dictionary=False)
    assert 1 << 18 < pq.ParquetFile(path).metadata.row_group(0).total_byte_size < 1 << 20
    assert split_inputs([path]) == [InputSplit(path, 0, 4000)]

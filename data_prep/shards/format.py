"""The shard format, written and read: a directory of Parquet files of packed rows beside one manifest.json."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.atomic_io import sha256_file
from pipeline.common.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IGNORE = -100  # the label of a token that is not supervised (Hugging Face convention)
PIVOT, TRANSLATION = "pivot", "translation"
OPEN_FILES = 128  # shards held open by a reader
ROW_GROUP = 8  # rows written, and so decoded on random access, at a time

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lens", pa.list_(pa.int32())),
        ("pair_id", pa.list_(pa.string())),
        ("lang", pa.list_(pa.string())),
        ("role", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class PackedRow:
    """One packed sequence of T tokens in S sequences; groups are contiguous and begin with their pivot.

    input_ids, labels: int32 [T], labels unshifted, -100 where unsupervised. seq_lens: int32 [S], its sum is T.
    pair_id, lang, role: lists of S strings; role is "pivot" or "translation".
    """

    input_ids: np.ndarray
    labels: np.ndarray
    seq_lens: np.ndarray
    pair_id: list[str]
    lang: list[str]
    role: list[str]

    @classmethod
    def from_encoded(
        cls, sequences: Sequence[np.ndarray], pair_id: list[str], lang: list[str], role: list[str]
    ) -> "PackedRow":
        """Build a row from encoded sequences, in which ~t (negative) is a supervised token t; see `ChatEncoder`."""
        encoded = np.concatenate(sequences)
        ids = np.where(encoded < 0, ~encoded, encoded)
        labels = np.where(encoded < 0, ids, np.int32(IGNORE))
        return cls(ids, labels, np.array([len(sequence) for sequence in sequences], np.int32), pair_id, lang, role)


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def write_shard(path: Path, rows: Sequence[PackedRow]) -> dict[str, Any]:
    """Write rows as one Parquet file, atomically.

    Returns its manifest entry: name, sha256, rows, tokens, supervised_tokens, sequences, pairs.
    """
    table = pa.table(
        [
            _lists([row.input_ids for row in rows], pa.int32()),
            _lists([row.labels for row in rows], pa.int32()),
            _lists([row.seq_lens for row in rows], pa.int32()),
            pa.array([row.pair_id for row in rows], SCHEMA.field("pair_id").type),
            pa.array([row.lang for row in rows], SCHEMA.field("lang").type),
            pa.array([row.role for row in rows], SCHEMA.field("role").type),
        ],
        schema=SCHEMA,
    )
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd", write_statistics=False)
    entry = {
        "name": path.name,
        "sha256": sha256_file(temporary),
        "rows": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "supervised_tokens": sum(int(np.count_nonzero(row.labels != IGNORE)) for row in rows),
        "sequences": sum(len(row.seq_lens) for row in rows),
        "pairs": sum(row.role.count(TRANSLATION) for row in rows),
    }
    os.replace(temporary, path)
    return entry


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """A list column from numpy arrays without passing through Python integers."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a shard directory. Raises UserError where there is none or it is not one of ours."""
    if not path.is_dir():
        raise UserError(f"{path}: no such shard directory; make it with: python -m data_prep pack --output {path} ...")
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"{path}: not a shard directory (no {MANIFEST}); make one with: python -m data_prep pack")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged manifest ({error}); pack again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise UserError(f"{file}: not a shard manifest; pack again")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format_version {version}, this program reads {FORMAT_VERSION}; pack again")
    return manifest


class ShardSet:
    """The rows of a shard directory, in order, with cheap random access: one row group is decoded at a time."""

    def __init__(self, path: Path, manifest: dict[str, Any], cached_groups: int = 32):
        self.path = path
        self.manifest = manifest
        self._starts = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])
        self._files: dict[int, tuple[pq.ParquetFile, np.ndarray]] = {}
        self._groups: dict[tuple[int, int], pa.Table] = {}
        self._cached_groups = cached_groups

    @classmethod
    def open(cls, path: str | Path, check_hashes: bool = True) -> "ShardSet":
        """Open a shard directory.

        Raises UserError for a missing or foreign directory, a missing shard, another format version, and, with
        `check_hashes`, a shard whose bytes are not those of the manifest.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for shard in manifest["shards"]:
            file = path / shard["name"]
            if not file.is_file():
                raise UserError(f"{file}: missing shard; pack again")
            if check_hashes and sha256_file(file) != shard["sha256"]:
                raise UserError(f"{file}: bytes differ from the manifest (corrupted shard); pack again")
        return cls(path, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = int(index - self._starts[shard])
        file, groups = self._file(shard)
        group = int(np.searchsorted(groups, within, side="right")) - 1
        table = self._groups.pop((shard, group), None)
        if table is None:
            table = file.read_row_group(group)
            if len(self._groups) >= self._cached_groups:
                self._groups.pop(next(iter(self._groups)))
        self._groups[shard, group] = table  # put back last: the first key is the least recently used
        return _row(table, within - int(groups[group]))

    def __iter__(self) -> Iterator[PackedRow]:
        return (self[index] for index in range(len(self)))

    def _file(self, shard: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """A shard's open file, and the rows at which its row groups begin, and its end."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            file = pq.ParquetFile(self.path / self.manifest["shards"][shard]["name"], memory_map=True)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._files[shard] = file, np.cumsum([0, *rows])
        return self._files[shard]


def _row(table: pa.Table, place: int) -> PackedRow:
    numbers = [table.column(name)[place].values.to_numpy() for name in ("input_ids", "labels", "seq_lens")]
    strings = [table.column(name)[place].as_py() for name in ("pair_id", "lang", "role")]
    return PackedRow(*numbers, *strings)

"""The shard format: write and read a directory of Parquet files of packed rows and their manifest.json."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.common.atomic_io import sha256_file, write_json
from pipeline.common.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IGNORE = -100  # label of a token that is not a target (Hugging Face convention)
PIVOT, TRANSLATION = "pivot", "translation"  # roles
COUNTS = ("rows", "tokens", "supervised_tokens", "sequences", "pairs")  # of a shard and of all shards, in the manifest
OPEN_FILES = 128  # maximum number of shards that a reader keeps open
CACHED_GROUPS = 32  # maximum number of decoded row groups that a reader keeps in memory
ROW_GROUP = 8  # rows in a Parquet row group; random access decodes a whole group

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
COPIES = pa.field("copies", pa.list_(pa.int32()))  # last column of every shard if any example group is split


@dataclass(frozen=True)
class PackedRow:
    """A packed row of T tokens in S sequences. The sequences of a group are consecutive, pivot first.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T]. Token ids of the target tokens (not shifted), and -100 for all other tokens.
        seq_lens: int32 [S]. Number of tokens in each sequence; they sum to T.
        pair_id, lang: S strings.
        role: S strings, "pivot" or "translation".
        copies: int32 [S]. Number of copies of the sequence in all shards. It is above 1 for the pivot of a split group,
            which each part of the group repeats. None if the shards do not record it: each sequence counts as one copy.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    seq_lens: np.ndarray
    pair_id: list[str]
    lang: list[str]
    role: list[str]
    copies: np.ndarray | None = None

    @classmethod
    def from_encoded(
        cls,
        sequences: Sequence[np.ndarray],
        pair_id: list[str],
        lang: list[str],
        role: list[str],
        copies: np.ndarray | None = None,
    ) -> "PackedRow":
        """Build a row from sequences that encode a target token t as ~t (negative); see `ChatEncoder`."""
        encoded = np.concatenate(sequences)
        ids = np.where(encoded < 0, ~encoded, encoded)
        labels = np.where(encoded < 0, ids, np.int32(IGNORE))
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        return cls(ids, labels, lengths, pair_id, lang, role, copies)

    def count_targets(self) -> np.ndarray:
        """Return the number of target tokens of each sequence, int64 [S]."""
        starts = np.cumsum(self.seq_lens) - self.seq_lens
        return np.add.reduceat(self.labels != IGNORE, starts, dtype=np.int64)


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.parquet"


def write_shard(path: Path, rows: Sequence[PackedRow]) -> dict[str, Any]:
    """Write rows atomically as one Parquet file. Return its manifest entry: name, sha256 and `COUNTS`.

    Either all rows have `copies`, or none has.
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
    copies = [row.copies for row in rows if row.copies is not None]
    if copies:
        table = table.append_column(COPIES, _lists(copies, pa.int32()))
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd", write_statistics=False)
    entry = {"name": path.name, "sha256": sha256_file(temporary), **count_rows(rows)}
    os.replace(temporary, path)
    return entry


def count_rows(rows: Iterable[PackedRow]) -> dict[str, int]:
    """Compute the `COUNTS` of rows. A pair is a translation with its pivot."""
    totals = dict.fromkeys(COUNTS, 0)
    for row in rows:
        supervised = int(np.count_nonzero(row.labels != IGNORE))
        counts = (1, len(row.input_ids), supervised, len(row.seq_lens), row.role.count(TRANSLATION))
        for name, count in zip(COUNTS, counts, strict=True):
            totals[name] += count
    return totals


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """Build a list column from numpy arrays without converting their values to Python integers."""
    if sum(map(len, arrays)) >= 2**31:
        raise UserError("a shard would have 2^31 tokens or more; lower --rows_per_shard")
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


def write_manifest(
    path: Path,
    head: dict[str, Any],
    shards: list[dict[str, Any]],
    per_language: Mapping[str, Mapping[str, int]],
    drops: dict[str, dict[str, int]],
) -> None:
    """Write the manifest of a shard directory.

    Args:
        path: Folder of the shards.
        head: Everything that determines the bytes of the shards: settings, tokenizer and sources.
        shards: The result of `write_shard` for each shard.
        per_language: Number of sequences, tokens, target tokens and characters by language.
        drops: Number of dropped or truncated sequences by reason and language.
    """
    totals = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    manifest = {
        **head,
        "languages": sorted(per_language),
        "shards": shards,
        "totals": totals,
        "per_language": {lang: dict(counts) for lang, counts in per_language.items()},
        "drops": drops,
        "fill": totals["tokens"] / (totals["rows"] * head["max_seq_length"]),  # packing efficiency
    }
    write_json(path / MANIFEST, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a shard directory. Raises UserError if it is missing or unreadable."""
    if path.is_file():
        raise UserError(f"{path}: a file, not a shard directory; name a directory")
    if not path.is_dir():
        raise UserError(f"{path}: no such shard directory; make it with: python -m data_prep pack --output {path} ...")
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"{path}: not a shard directory (no {MANIFEST}); make one with: python -m data_prep pack")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged manifest ({error}); pack again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise UserError(f"{file}: not a shard manifest; pack again")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format_version {version}, but this version reads {FORMAT_VERSION}; pack again")
    return manifest


class ShardSet:
    """Rows of a shard directory, with cheap random access: one row group is decoded at a time. Threads may share it.

    Args:
        path: Shard directory.
        manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self._starts = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])
        self._lock = Lock()  # two threads must not read one Parquet file at the same time
        self._open = lru_cache(OPEN_FILES)(self._open_shard)
        self._read = lru_cache(CACHED_GROUPS)(self._read_row_group)

    @classmethod
    def open(cls, path: str | Path, check_hashes: bool = True) -> "ShardSet":
        """Open a shard directory.

        Args:
            path: Shard directory.
            check_hashes: Whether to call `check_hashes`, which reads all shards.

        Raises:
            UserError: The directory or a shard is missing, this version cannot read the manifest, or a hash differs.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for shard in manifest["shards"]:
            file = path / shard["name"]
            if not file.is_file():
                raise UserError(f"{file}: missing shard; pack again")
        shards = cls(path, manifest)
        if check_hashes:
            shards.check_hashes()
        return shards

    def check_hashes(self) -> None:
        """Compare the SHA-256 of every shard with the manifest.

        Raises:
            UserError: A hash differs.
        """
        for shard in self.manifest["shards"]:
            file = self.path / shard["name"]
            try:
                digest = sha256_file(file)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror})") from None
            if digest != shard["sha256"]:
                raise UserError(f"{file}: bytes differ from the manifest (corrupted shard); pack again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = int(index - self._starts[shard])
        with self._lock:
            _, starts = self._open(shard)
            group = int(np.searchsorted(starts, within, side="right")) - 1
            table = self._read(shard, group)
        return _to_packed_row(table, within - int(starts[group]))

    def __iter__(self) -> Iterator[PackedRow]:
        return (self[index] for index in range(len(self)))

    def read_columns(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the columns of each shard that are in `names`. Columns that the shard does not have are omitted.

        Raises UserError if a shard is not a Parquet file.
        """
        for shard in self.manifest["shards"]:
            try:
                with pq.ParquetFile(self.path / shard["name"], memory_map=True) as file:
                    yield file.read([name for name in names if name in file.schema_arrow.names])
            except pa.ArrowInvalid as error:
                raise UserError(f"{self.path / shard['name']}: damaged shard ({error}); pack again") from None
            except OSError as error:
                raise UserError(f"{self.path / shard['name']}: cannot be read ({error.strerror})") from None

    def longest_sequence(self) -> int:
        """Return the number of tokens in the longest sequence. Reads one small column of every shard."""
        columns = (table["seq_lens"] for table in self.read_columns(["seq_lens"]))
        return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)

    def largest_token(self) -> int:
        """Return the largest token id. Reads the tokens of every shard."""
        columns = (table["input_ids"] for table in self.read_columns(["input_ids"]))
        return max((pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns), default=0)

    def _open_shard(self, shard: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """Open a shard. Return its file, and where each row group starts, followed by the total of rows."""
        file = pq.ParquetFile(self.path / self.manifest["shards"][shard]["name"], memory_map=True)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return file, np.cumsum([0, *rows])

    def _read_row_group(self, shard: int, group: int) -> pa.Table:
        return self._open(shard)[0].read_row_group(group)


def _to_packed_row(table: pa.Table, position: int) -> PackedRow:
    names = ["input_ids", "labels", "seq_lens", *(name for name in (COPIES.name,) if name in table.column_names)]
    numbers = {name: table.column(name)[position].values.to_numpy() for name in names}
    strings = {name: table.column(name)[position].as_py() for name in ("pair_id", "lang", "role")}
    return PackedRow(**numbers, **strings)

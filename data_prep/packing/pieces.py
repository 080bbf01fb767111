"""First half of packing: each input piece becomes a file of tokens and an index, sorted by packing window.

A piece's tokens lie in `piece-N.tokens` (int32, complement where supervised), its index in `piece-N.arrow` with one
record batch per window. The index is written last: where it is there, the piece is finished.
"""

import hashlib
import os
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.records import Piece, describe, read_piece
from data_prep.tokenization.chat_template import ChatEncoder
from pipeline.common.errors import UserError

BATCH = 512  # records tokenized in one call

INDEX = pa.schema(
    [
        ("key", pa.uint64()),  # hash of the pair_id: decides window and order
        ("pair_id", pa.string()),
        ("lang", pa.string()),
        ("place", pa.int64()),  # in the input, for messages
        ("offset", pa.int64()),  # in the tokens file, in tokens
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("characters", pa.int32()),
    ]
)


def pair_key(pair_id: str, seed: int) -> int:
    """64 bits that scatter pair ids evenly: groups are packed and shuffled in the order of their keys."""
    digest = hashlib.blake2b(pair_id.encode("utf-8"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def tokens_file(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.tokens"


def index_file(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.arrow"


def tokenize_piece(piece: Piece, number: int, folder: Path, encoder: ChatEncoder, windows: int, seed: int) -> None:
    """Read, render, tokenize and store one piece. Raises UserError naming file and row for a record that cannot be."""
    columns: dict[str, list] = {name: [] for name in ("key", "pair_id", "lang", "place", "characters")}
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    records = read_piece(piece)
    while batch := list(islice(records, BATCH)):
        encoded: list[list[int]] = []
        for (place, record), tokens in zip(batch, encoder.encode([r.messages for _, r in batch]), strict=True):
            if isinstance(tokens, UserError):
                raise UserError(f"{describe(piece.path, place)} (pair_id {record.pair_id}, {record.lang}): {tokens}")
            encoded.append(tokens)
            columns["key"].append(pair_key(record.pair_id, seed))
            columns["pair_id"].append(record.pair_id)
            columns["lang"].append(record.lang)
            columns["place"].append(place)
            columns["characters"].append(sum(len(message["content"]) for message in record.messages))
        lengths += map(len, encoded)
        parts.append(np.fromiter(chain.from_iterable(encoded), np.int32))
    flat = np.concatenate([np.zeros(0, np.int32), *parts])
    _store(number, folder, columns, flat, np.array(lengths, np.int64), windows)


def _store(
    number: int, folder: Path, columns: dict[str, list], tokens: np.ndarray, lengths: np.ndarray, windows: int
) -> None:
    """Write tokens and index in the order of keys, hence of windows."""
    keys = np.array(columns["key"], np.uint64)
    order = np.argsort(keys, kind="stable")
    starts = np.cumsum(lengths) - lengths
    supervised = np.add.reduceat(tokens < 0, starts, dtype=np.int32) if len(lengths) else np.zeros(0, np.int32)
    offsets = np.cumsum(lengths[order]) - lengths[order]
    gather = np.repeat(starts[order] - offsets, lengths[order]) + np.arange(len(tokens))
    temporary = tokens_file(folder, number).with_suffix(".tmp")
    tokens[gather].tofile(temporary)
    os.replace(temporary, tokens_file(folder, number))
    table = pa.table({**columns, "key": keys, "length": lengths, "supervised": supervised}).take(order)
    table = table.append_column("offset", pa.array(offsets)).select(INDEX.names).cast(INDEX)
    # Window w has the keys from w * 2**64 / windows on.
    bounds = np.searchsorted((keys[order] >> 32) * windows >> 32, np.arange(windows + 1))
    temporary = index_file(folder, number).with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, INDEX) as writer:
        for start, stop in pairwise(bounds.tolist()):
            batches = table.slice(start, stop - start).combine_chunks().to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], INDEX))
    os.replace(temporary, index_file(folder, number))


def read_window(folder: Path, pieces: int, window: int) -> pa.Table:
    """The index of one window over all pieces, with a column `piece`, sorted by group and language."""
    tables = []
    for number in range(pieces):
        with pa.memory_map(str(index_file(folder, number))) as source:
            table = pa.Table.from_batches([pa.ipc.open_file(source).get_batch(window)])
        tables.append(table.append_column("piece", pa.array(np.full(len(table), number, np.int32))))
    by = [(name, "ascending") for name in ("key", "pair_id", "lang", "piece", "place")]
    return pa.concat_tables(tables).sort_by(by).combine_chunks()


class TokenReader:
    """Reads sequences back from the tokens files of all pieces."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[int, int] = {}

    def read(self, piece: int, offset: int, length: int) -> np.ndarray:
        """int32 [length], as `ChatEncoder.encode` gave them."""
        if piece not in self._files:
            if len(self._files) >= 256:  # stay far below the limit on open files
                self.close()
            self._files[piece] = os.open(tokens_file(self._folder, piece), os.O_RDONLY)
        return np.frombuffer(os.pread(self._files[piece], 4 * length, 4 * offset), np.int32)

    def supervised_within(self, piece: int, offset: int, length: int) -> int:
        """How many of the first `length` tokens are supervised."""
        return int(np.count_nonzero(self.read(piece, offset, length) < 0))

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

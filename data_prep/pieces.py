"""First half of packing: each input piece becomes a file of tokens and an index, sorted by packing window.

A piece's tokens lie in `piece-N.tokens` (int32, complement where supervised), its index in `piece-N.arrow` with one
record batch per window. The index is written last: where it is there, the piece is finished.
"""

import hashlib
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.chat import ChatEncoder
from data_prep.errors import UserError
from data_prep.records import Piece, Record, describe, read_piece

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
    digest = hashlib.blake2b(pair_id.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def tokens_file(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.tokens"


def index_file(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.arrow"


def tokenize_piece(piece: Piece, number: int, folder: Path, encoder: ChatEncoder, windows: int, seed: int) -> None:
    """Read, render, tokenize and store one piece. Raises UserError naming file and row for a record that cannot be."""
    entries: list[tuple] = []
    arrays: list[np.ndarray] = []
    records = read_piece(piece)
    while batch := list(islice(records, BATCH)):
        for (place, record), tokens in zip(batch, encoder.encode([r.messages for _, r in batch]), strict=True):
            if isinstance(tokens, UserError):
                raise UserError(f"{describe(piece.path, place)} (pair_id {record.pair_id}, {record.lang}): {tokens}")
            entries.append(_entry(place, record, tokens, seed))
            arrays.append(tokens)
    order = sorted(range(len(entries)), key=lambda i: entries[i][0])  # by key, hence by window
    temporary = tokens_file(folder, number).with_suffix(".tmp")
    offset = 0
    by_window: dict[int, list[tuple]] = {}
    with open(temporary, "wb") as file:
        for i in order:
            key, *names, length, supervised, characters = entries[i]
            by_window.setdefault(key * windows >> 64, []).append((key, *names, offset, length, supervised, characters))
            arrays[i].tofile(file)
            offset += length
    os.replace(temporary, tokens_file(folder, number))
    temporary = index_file(folder, number).with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, INDEX) as writer:
        for window in range(windows):
            columns = zip(*by_window.get(window, []), strict=True) if window in by_window else [[]] * len(INDEX)
            writer.write_batch(
                pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)], INDEX)
            )
    os.replace(temporary, index_file(folder, number))


def _entry(place: int, record: Record, tokens: np.ndarray, seed: int) -> tuple:
    characters = sum(len(message["content"]) for message in record.messages)
    supervised = int(np.count_nonzero(tokens < 0))
    return pair_key(record.pair_id, seed), record.pair_id, record.lang, place, len(tokens), supervised, characters


def read_window(folder: Path, pieces: int, window: int) -> list[tuple]:
    """The index entries of one window in all pieces: (piece number, *INDEX columns), in input order by piece."""
    entries = []
    for number in range(pieces):
        with pa.memory_map(str(index_file(folder, number))) as source:
            batch = pa.ipc.open_file(source).get_batch(window)
            columns = [column.to_pylist() for column in batch.columns]
        entries += [(number, *entry) for entry in zip(*columns, strict=True)]
    return entries


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

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

"""First step of packing: write each input split as a file of tokens and an index sorted by packing window.

The tokens are in `piece-N.tokens` as int32, where a target token t is stored as its complement ~t. The index is in
`piece-N.arrow`, with one record batch per window. It is written last, so a split is finished if its index exists. The
columns `piece` and `place` are the number N of the input split and the position of the record in the input file.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.packing.settings import PackSettings
from data_prep.readers import InputRow, InputSplit, read_split
from data_prep.records import Record, is_language_code, message_texts, number_text, parse_record
from data_prep.tokenization.chat_template import ChatEncoder
from pipeline.common.errors import UserError

BATCH = 512  # records encoded in one call

INDEX = pa.schema(
    [
        ("key", pa.uint64()),  # hash of the pair_id, which determines window and order
        ("pair_id", pa.string()),
        ("lang", pa.string()),
        ("place", pa.int64()),  # position in the input file, for error messages
        ("offset", pa.int64()),  # position in the tokens file, in tokens
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("characters", pa.int32()),
        ("gold", pa.string()),  # normalized, for the comparison within a group
    ]
)
UNKNOWN_LANGUAGE = "?"
SKIPPED = b"skipped"  # schema metadata of an index: the number of bad records by language, as JSON


def pair_key(pair_id: str, seed: int) -> int:
    """Return a uniformly distributed 64-bit hash of a pair id. Sorting groups by this key shuffles them."""
    digest = hashlib.blake2b(pair_id.encode("utf-8"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def tokens_file(folder: Path, number: int) -> Path:
    """Return the path of the tokens file of a split."""
    return folder / f"piece-{number:05d}.tokens"


def index_file(folder: Path, number: int) -> Path:
    """Return the path of the index file of a split."""
    return folder / f"piece-{number:05d}.arrow"


def tokenize_split(
    split: InputSplit, number: int, folder: Path, encoder: ChatEncoder, windows: int, settings: PackSettings
) -> None:
    """Tokenize the records of a split and write its tokens and index.

    Args:
        split: The input split.
        number: Index of the split, used in the file names.
        folder: Directory that the files are written to.
        encoder: Encoder for the conversations.
        windows: Number of packing windows.
        settings: The seed of `pair_key`, and what to do with bad records. The first one that is skipped is printed.

    Raises:
        UserError: A record is malformed or cannot be encoded; the message names the file and the row.
    """
    columns: dict[str, list] = {name: [] for name in ("key", "pair_id", "lang", "place", "characters", "gold")}
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    skipped: Counter = Counter()

    def reject(row: InputRow, error: UserError, lang: str, details: str = "") -> None:
        stop = settings.on_bad_record == "error"
        if stop or not skipped:  # not for every record, because finding the row reads the file up to it
            located = f"{row.location}{details}: {error}"
            if stop:
                raise UserError(located)
            print(f"skipped: {located}", file=sys.stderr, flush=True)
        skipped[lang] += 1

    rows = _parse_rows(read_split(split, keep_malformed=True), reject)
    while batch := list(islice(rows, BATCH)):
        encoded: list[list[int]] = []
        records = [record for _, record in batch]
        results = encoder.encode([r.messages for r in records], [r.tools for r in records])
        for (row, record), tokens in zip(batch, results, strict=True):
            if isinstance(tokens, UserError):
                reject(row, tokens, record.lang, f" (pair_id {record.pair_id}, {record.lang})")
                continue
            encoded.append(tokens)
            columns["key"].append(pair_key(record.pair_id, settings.seed))
            columns["pair_id"].append(record.pair_id)
            columns["lang"].append(record.lang)
            columns["place"].append(row.position)
            columns["characters"].append(sum(len(text) for m in record.messages for text in message_texts(m)))
            columns["gold"].append(number_text(record.gold))
        lengths += map(len, encoded)
        parts.append(np.fromiter(chain.from_iterable(encoded), np.int32))
    all_tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    schema = INDEX.with_metadata({SKIPPED: json.dumps(skipped)})
    _write_files(number, folder, columns, all_tokens, np.array(lengths, np.int64), windows, schema)


def _parse_rows(
    rows: Iterable[InputRow], reject: Callable[[InputRow, UserError, str], None]
) -> Iterator[tuple[InputRow, Record]]:
    """Yield each row with its record. Malformed rows are passed to `reject` with their language, or "?"."""
    for row in rows:
        try:
            if isinstance(row.value, UserError):
                raise row.value
            record = parse_record(row.value)
        except UserError as error:
            lang = row.value.get("lang") if isinstance(row.value, dict) else None
            reject(row, error, lang if isinstance(lang, str) and is_language_code(lang) else UNKNOWN_LANGUAGE)
        else:
            yield row, record


def warn_of_other_prompt(split: InputSplit, encoder: ChatEncoder) -> None:
    """Warn if the first record of a split is trained on after another prompt than generation would use."""
    for row in read_split(split, keep_malformed=True):
        try:
            record = row.apply(parse_record)
        except UserError:
            continue
        if mismatch := encoder.prompt_mismatch(record.messages, record.tools):
            print(
                f"warning: {row.location}: {mismatch}; set variables of the template with --chat_template_kwargs "
                "or give another with --chat_template",
                file=sys.stderr,
                flush=True,
            )
        return


def count_skipped(folder: Path, splits: int) -> Counter:
    """Return the number of bad records of all splits by language; `UNKNOWN_LANGUAGE` if it has none."""
    total: Counter = Counter()
    for number in range(splits):
        with pa.memory_map(str(index_file(folder, number))) as source:
            total.update(json.loads(pa.ipc.open_file(source).schema.metadata[SKIPPED]))
    return total


def _write_files(
    number: int,
    folder: Path,
    columns: dict[str, list],
    tokens: np.ndarray,
    lengths: np.ndarray,
    windows: int,
    schema: pa.Schema,
) -> None:
    """Write the tokens and the index, sorted by key and therefore by window."""
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
    table = table.append_column("offset", pa.array(offsets)).select(schema.names).cast(schema)
    # Window w contains the keys from w * 2**64 / windows to (w + 1) * 2**64 / windows.
    bounds = np.searchsorted((keys[order] >> 32) * windows >> 32, np.arange(windows + 1))
    temporary = index_file(folder, number).with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start, stop in pairwise(bounds.tolist()):
            batches = table.slice(start, stop - start).combine_chunks().to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema))
    os.replace(temporary, index_file(folder, number))


def read_window(folder: Path, splits: int, window: int) -> pa.Table:
    """Return the index of one window over all splits, sorted by group and language.

    The added column `piece` holds the split number.
    """
    tables = []
    for number in range(splits):
        with pa.memory_map(str(index_file(folder, number))) as source:
            table = pa.Table.from_batches([pa.ipc.open_file(source).get_batch(window)]).replace_schema_metadata()
        tables.append(table.append_column("piece", pa.array(np.full(len(table), number, np.int32))))
    by = [(name, "ascending") for name in ("key", "pair_id", "lang", "piece", "place")]
    return pa.concat_tables(tables).sort_by(by).combine_chunks()


class TokenReader:
    """Reader of the sequences in the tokens files of all input splits."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[int, int] = {}

    def read(self, split: int, offset: int, length: int) -> np.ndarray:
        """Return the first `length` tokens of a sequence as int32 [length], encoded as by `ChatEncoder.encode`."""
        if split not in self._files:
            if len(self._files) >= 256:  # far below the limit on open files
                self.close()
            self._files[split] = os.open(tokens_file(self._folder, split), os.O_RDONLY)
        return np.frombuffer(os.pread(self._files[split], 4 * length, 4 * offset), np.int32)

    def count_supervised(self, split: int, offset: int, length: int) -> int:
        """Return the number of target tokens among the first `length` tokens of a sequence."""
        return int(np.count_nonzero(self.read(split, offset, length) < 0))

    def close(self) -> None:
        """Close all files. A later `read` opens them again."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

"""Canonical records: what one is, how JSON Lines and Parquet files hold them, and the pieces in which they are read."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.errors import UserError

# JSON Lines are read in pieces of 1/64 of the input within these bounds, Parquet files row group by row group: enough
# pieces for many ranks to share, each small enough to be held in memory.
PIECE_BYTES = (1 << 20, 16 << 20)


_LANG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class Record(NamedTuple):
    """One training conversation in one language. Records with one pair_id are translations of one problem."""

    pair_id: str
    lang: str
    messages: list[dict[str, str]]  # role and content each; the last one is the assistant's
    gold: str | None


class Piece(NamedTuple):
    """A part of an input file: bytes [start, stop) of JSON Lines (lines that start there), or row groups of Parquet."""

    path: Path
    start: int
    stop: int


def parse_record(raw: Any) -> Record:
    """Check one decoded record. Raises UserError, without its place, where it is not canonical."""
    if not isinstance(raw, dict):
        raise UserError("not a JSON object; a record looks like {pair_id, lang, question, answer, gold}")
    pair_id, lang = raw.get("pair_id"), raw.get("lang")
    if isinstance(pair_id, int) and not isinstance(pair_id, bool):
        pair_id = str(pair_id)
    if not isinstance(pair_id, str) or not pair_id:
        raise UserError("no `pair_id` (a non-empty string that the translations of one problem share)")
    if len(pair_id) > 256 or not _is_unicode(pair_id):
        raise UserError("`pair_id` is longer than 256 characters or not valid Unicode")
    if not isinstance(lang, str) or not lang:
        raise UserError("no `lang` (a language code such as en)")
    if not _LANG.fullmatch(lang):
        raise UserError(f"`lang` is {lang[:40]!a}, not a language code such as en or zh-Hant")
    gold = raw.get("gold")
    if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float)):
        raise UserError("`gold` is neither a string nor a number")
    return Record(pair_id, lang, _messages(raw), None if gold is None else str(gold))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as JSON escapes can spell
        return False
    return True


def _messages(raw: dict[str, Any]) -> list[dict[str, str]]:
    messages = raw.get("messages")
    if messages is None:
        question, answer = raw.get("question"), raw.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError("neither `messages` nor the strings `question` and `answer`")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    elif not isinstance(messages, list) or not messages:
        raise UserError("`messages` is not a list of {role, content}")
    else:
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError("`messages` is not a list of {role, content}")
            if not isinstance(message.get("content"), str):
                raise UserError(f"the `content` of a {message['role'][:40]!a} message is not a string")
    system = raw.get("system")
    if system is not None:
        if not isinstance(system, str):
            raise UserError("`system` is not a string")
        messages = [{"role": "system", "content": system}, *messages]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError("empty response: the last message must be the assistant's and hold text")
    return messages


def plan_pieces(paths: list[Path], piece_bytes: int = 0) -> list[Piece]:
    """Cut input files into pieces, the same however many ranks share them; `piece_bytes` 0 goes by the input's size.

    Raises UserError for a missing, unreadable or empty file, or a Parquet file that is none.
    """
    sizes = [_size(path) for path in paths]
    piece_bytes = piece_bytes or min(max(sum(sizes) // 64, PIECE_BYTES[0]), PIECE_BYTES[1])
    pieces = []
    for path, size in zip(paths, sizes, strict=True):
        if path.suffix == ".parquet":
            pieces += [Piece(path, group, group + 1) for group in range(_open_parquet(path).num_row_groups)]
        else:
            pieces += [Piece(path, start, min(start + piece_bytes, size)) for start in range(0, size, piece_bytes)]
    return pieces


def _size(path: Path) -> int:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise UserError(f"{path}: empty file; nothing to pack")
    return size


def read_piece(piece: Piece) -> Iterator[tuple[int, Record]]:
    """The records of a piece, each with its place in the file (see `describe`).

    Raises UserError naming file and row for a malformed line or record.
    """
    rows = _parquet_rows(piece) if piece.path.suffix == ".parquet" else _json_rows(piece)
    for place, raw in rows:
        try:
            yield place, parse_record(raw)
        except UserError as error:
            raise UserError(f"{describe(piece.path, place)}: {error}") from None


def _json_rows(piece: Piece) -> Iterator[tuple[int, Any]]:
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the line that reaches over the start belongs to the piece before
        while (place := file.tell()) < piece.stop:
            line = file.readline()
            try:
                text = line.decode("utf-8-sig" if place == 0 else "utf-8")
                if not text.strip():
                    continue
                raw = json.loads(text)
            except UnicodeDecodeError:
                raise UserError(f"{describe(piece.path, place)}: not UTF-8 text") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{describe(piece.path, place)}: malformed JSON ({error})") from None
            yield place, raw


def _parquet_rows(piece: Piece) -> Iterator[tuple[int, Any]]:
    file = _open_parquet(piece.path)
    try:
        first = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        rows = file.read_row_group(piece.start).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{piece.path}: damaged Parquet file ({_line(error)})") from None
    for place, row in enumerate(rows, start=first):
        yield place, {key: value for key, value in row.items() if value is not None}


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({_line(error)})") from None


def describe(path: Path, place: int) -> str:
    """A record's file and row, counted from 1. A place is a byte offset in JSON Lines, a row number in Parquet."""
    if path.suffix == ".parquet":
        return f"{path} row {place + 1}"
    row = 1
    with open(path, "rb") as file:
        while place > 0 and (block := file.read(min(place, 1 << 20))):
            row += block.count(b"\n")
            place -= len(block)
    return f"{path} row {row}"


def _line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(". ")


def record_line(pair_id: str, lang: str, question: str, answer: str, gold: str | None) -> str:
    """One canonical JSON line; the one spelling, so that equal data gives equal bytes."""
    record = {"pair_id": pair_id, "lang": lang, "question": question, "answer": answer}
    if gold is not None:
        record["gold"] = gold
    return json.dumps(record, ensure_ascii=False) + "\n"

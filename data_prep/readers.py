"""Read JSON Lines, Parquet and plain text files, whole or in splits, and locate rows for error messages.

JSON Lines files are split by byte ranges, and Parquet files by row groups and parts of large row groups. One rank holds
a whole split in memory, so there should be many small splits.
"""

import codecs
import json
import os
from collections.abc import Callable, Iterator
from decimal import Decimal, DecimalException
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_prep.parquet_rows import divide_parquet, read_parquet
from pipeline.common.errors import UserError, storage_errors

SPLIT_BYTES = (1 << 18, 16 << 20)  # smallest and largest default split of a JSON Lines file
PARQUET_SPLIT_BYTES = 1 << 20  # smallest default split of a row group, which is decoded up to the end of each split
SPLITS = 64  # default number of splits, if their size is within those bounds

T = TypeVar("T")


class InputSplit(NamedTuple):
    """A part of an input file.

    Attributes:
        path: A JSON Lines file, or a Parquet file if the suffix is `.parquet`.
        start, stop: Byte range [start, stop) for JSON Lines (the lines that start in it), or row numbers for Parquet.
    """

    path: Path
    start: int
    stop: int


class InputRow(NamedTuple):
    """A line or row of an input file.

    Attributes:
        path: The file.
        position: Byte offset of the line, or row number from 0 in a Parquet file.
        value: The line, the decoded JSON value, or the Parquet row as a dictionary; see `read_split` for an error. JSON
            numbers with a decimal point or an exponent are decoded as `Decimal`.
        number: Row number from 1 if the file was read from its start, or None.
    """

    path: Path
    position: int
    value: Any
    number: int | None = None

    @property
    def location(self) -> str:
        """File and row, for error messages; see `locate`."""
        return locate(self.path, self.position) if self.number is None else f"{self.path} row {self.number}"

    def apply(self, function: Callable[[Any], T]) -> T:
        """Return `function(value)`. If it raises a UserError, prefix the message with file and row.

        A value that is a UserError itself, see `read_split`, is raised in the same way.
        """
        try:
            if isinstance(self.value, UserError):
                raise self.value
            return function(self.value)
        except UserError as error:
            raise UserError(f"{self.location}: {error}") from None


def locate(path: Path, position: int) -> str:
    """Return "PATH row N" for the row at `position` (see `InputRow`); N counts from 1 and includes blank lines."""
    if is_parquet(path):
        return f"{path} row {position + 1}"
    row = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            row += block.count(b"\n")
            position -= len(block)
    return f"{path} row {row}"


def is_parquet(path: Path) -> bool:
    """Return whether a file has the suffix of a Parquet file."""
    return path.suffix == ".parquet"


def split_inputs(paths: list[Path], split_bytes: int = 0) -> list[InputSplit]:
    """Divide input files into splits that do not depend on the number of ranks.

    Args:
        paths: JSON Lines and Parquet files.
        split_bytes: Largest size of a split. 0 for 1/64 of the whole input, within the bounds `SPLIT_BYTES`, and at
            least `PARQUET_SPLIT_BYTES` for Parquet.

    Returns:
        The splits of each file, in the order of `paths`.

    Raises:
        UserError: A file is missing, unreadable, empty, or has the suffix `.parquet` but is not Parquet.
    """
    sizes = [_nonzero_size(path) for path in paths]
    largest = split_bytes or min(max(-(-sum(sizes) // SPLITS), SPLIT_BYTES[0]), SPLIT_BYTES[1])
    splits = []
    for path, size in zip(paths, sizes, strict=True):
        if is_parquet(path):
            parts_of_rows = divide_parquet(path, split_bytes or max(largest, PARQUET_SPLIT_BYTES))
            splits += [InputSplit(path, start, stop) for start, stop in parts_of_rows]
        else:
            parts = -(-size // largest)
            bounds = [size * part // parts for part in range(parts + 1)]  # equal sizes, so that ranks share the work
            splits += [InputSplit(path, start, stop) for start, stop in pairwise(bounds)]
    return splits


def _without_mark(path: Path, start: bytes) -> bytes:
    """Remove a byte order mark from the start of a file. Raises UserError if the file is compressed."""
    if start.startswith((b"\x1f\x8b", b"(\xb5/\xfd")):
        raise UserError(f"{path}: a file compressed by gzip or zstd; decompress it first")
    return start.removeprefix(codecs.BOM_UTF8)


def _nonzero_size(path: Path) -> int:
    """Return the size of a file. Raises UserError if it is missing, empty or of a type that only `convert` reads."""
    if path.is_dir():
        command = f"python -m data_prep convert --input {path} ..."
        raise UserError(f"{path}: a folder; give its files, or first run: {command}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = _without_mark(path, file.read(64)).lstrip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise UserError(f"{path}: empty file; give a file with records")
    if path.suffix == ".csv" or start.startswith(b"["):
        kind = "CSV file" if path.suffix == ".csv" else "JSON array"
        raise UserError(
            f"{path}: a {kind}; first run: python -m data_prep convert --format canonical --input {path} ..."
        )
    return size


def read_split(split: InputSplit, keep_malformed: bool = False) -> Iterator[InputRow]:
    """Yield the decoded rows of a split.

    Args:
        split: The split.
        keep_malformed: Whether a line that is not JSON is yielded with the error as its value, which `InputRow.apply`
            raises, instead of ending the iteration. The error does not name file and row, because finding the row
            reads the file up to it.

    Raises:
        UserError: A line is not JSON or the Parquet file is damaged; the message names the file and row.
        StorageError: The file system failed to read the file.
    """
    if is_parquet(split.path):
        return (InputRow(split.path, number, row) for number, row in read_parquet(*split))
    return _read_json_lines(split.path, split.start, split.stop, keep_malformed)


def read_file(path: Path) -> Iterator[InputRow]:
    """Yield all decoded rows of a JSON Lines or Parquet file. Raises UserError like `read_split`."""
    if is_parquet(path):
        return (InputRow(path, number, row) for number, row in read_parquet(path))
    return _read_json_lines(path)


def read_inputs(paths: list[Path]) -> Iterator[InputRow]:
    """Yield all decoded rows of input files in their order. Raises UserError like `split_inputs` and `read_split`."""
    split_inputs(paths)  # checks the files
    for path in paths:
        yield from read_file(path)


def read_lines(path: Path) -> Iterator[InputRow]:
    """Yield the lines of a UTF-8 text file without their line ends. A byte order mark at the start is removed.

    Raises UserError with the file and row if a line is not UTF-8.
    """
    for row in _raw_lines(path, 0, None):
        yield row._replace(value=row.apply(_decode_line))


def _raw_lines(path: Path, start: int, stop: int | None) -> Iterator[InputRow]:
    """Yield the undecoded lines that start in the byte range [start, stop)."""
    with storage_errors(path), open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that starts before the range
        position, number = file.tell(), 0
        while (stop is None or position < stop) and (line := file.readline()):
            number += 1
            value = line if position else _without_mark(path, line)
            yield InputRow(path, position, value, None if start else number)
            position += len(line)


def _decode_line(line: bytes) -> str:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text") from None


def _read_json_lines(
    path: Path, start: int = 0, stop: int | None = None, keep_malformed: bool = False
) -> Iterator[InputRow]:
    for row in _raw_lines(path, start, stop):
        if not row.value.strip():
            continue
        row = row._replace(value=_decode_or_error(row.value))
        if not keep_malformed:
            row.apply(lambda _: None)  # raises the error
        yield row


def _decode_or_error(line: bytes) -> Any:
    """Return the JSON value of a line, or the UserError if it is not JSON."""
    try:
        return _decode_json(_decode_line(line))
    except UserError as error:
        return error


# Exact: a float would round a long gold answer. `json.loads` would create a decoder for every line.
_JSON = json.JSONDecoder(parse_float=Decimal)


def _decode_json(text: str) -> Any:
    if text.startswith("\ufeff"):
        raise UserError("malformed JSON (it begins with a byte order mark, which only a file may; remove it)")
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError, DecimalException) as error:
        raise UserError(f"malformed JSON ({error})") from None

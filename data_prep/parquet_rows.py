"""Read the rows of Parquet files, whole or in parts of row groups."""

import os
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.errors import UserError, first_line, read_error

PARTS = 64  # largest number of parts of a row group, each of which is read by decoding the group up to the part's end


def divide_parquet(path: Path, part_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the row numbers [start, stop) of each row group, or of parts of a row group larger than `part_bytes`.

    Writers such as pandas put up to a million rows into one row group.

    Raises:
        UserError: The file is not Parquet, or has no rows.
    """
    metadata = _open(path).metadata
    if not metadata.num_row_groups:
        raise UserError(f"{path}: no rows; give a file with records")
    first = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        parts = max(min(-(-group.total_byte_size // part_bytes), PARTS, group.num_rows), 1)
        yield from pairwise(first + group.num_rows * part // parts for part in range(parts + 1))
        first += group.num_rows


def read_parquet(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and values of the rows [start, stop), or of all rows from `start` on.

    Raises:
        UserError: The file is damaged or not Parquet, or a text is not valid UTF-8.
        StorageError: The file system failed to read the file.
    """
    file = _open(path)
    stop = file.metadata.num_rows if stop is None else stop
    try:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        firsts = list(accumulate(sizes, initial=0))
        groups = [group for group, size in enumerate(sizes) if firsts[group] < stop and start < firsts[group] + size]
        position = firsts[groups[0]] if groups else 0
        for batch in file.iter_batches(1024, row_groups=groups):
            first, position = position, position + len(batch)
            low = max(start - first, 0)
            rows = batch.slice(low, max(min(stop - first, len(batch)) - low, 0))
            yield from enumerate(map(without_nulls, _decoded(rows, path, first + low)), first + low)
            if position >= stop:
                return
    except (pa.ArrowException, OSError) as error:
        _raise_read_error(error, path)
        raise UserError(f"{path}: damaged Parquet file ({first_line(error)})") from None


def _decoded(rows: pa.RecordBatch, path: Path, first: int) -> list[dict[str, Any]]:
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check texts before they are read
        for number in range(len(rows)):
            try:
                rows.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{path} row {first + number + 1}: not valid UTF-8 ({error.reason})") from None
        raise


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        _raise_read_error(error, path)
        raise UserError(f"{path}: not a Parquet file ({first_line(error)})") from None


def _raise_read_error(error: Exception, path: Path) -> None:
    """Raise StorageError if the system reported an error. For damaged files, Arrow raises OSError without errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise read_error(path, OSError(error.errno, os.strerror(error.errno))) from None


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Remove the keys without a value from the structs in a row's columns.

    Arrow gives all structs of a column the same keys, so that one JSON schema would have the properties of all others.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value

"""The input of a conversion, and the examples that the readers of all formats yield."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.readers import InputRow, read_file
from data_prep.records import number_text
from pipeline.common.errors import UserError


class RawExample(NamedTuple):
    """An example read from another format, before the checks against its group.

    Attributes:
        pair_id: Shared by the translations of one example.
        lang: Language code.
        fields: `question` and `answer`, or `messages`, and optionally `system`.
        gold: Final answer, or None if absent.
        drop_reason: Why the format marks the example as unusable, or an empty string.
        location: File and row, if `pair_id` is the file's own.
    """

    pair_id: str
    lang: str
    fields: dict[str, Any]
    gold: str | None
    drop_reason: str = ""
    location: str = ""


class Source(NamedTuple):
    """The input of a conversion.

    Attributes:
        inputs: Files, folders or Hub dataset IDs.
        columns: Mapping from a field of a record to the column name in the input, if the names differ. A name with
            `{lang}` stands for one column per language.
        pivot: Language that the others are translations of.
        split: Split of a dataset or benchmark, or None for the default: train, or the test split of a benchmark.
        config: Configuration of a dataset, or None. A name with `{lang}` stands for one configuration per language.
        languages: Languages that `{lang}` stands for, or of a benchmark's files, those to read if not all.
        unpaired: Whether groups without a translation are kept. If so, a table needs no `pair_id` and no `lang` column:
            the row number and the pivot are used instead.
    """

    inputs: list[str]
    columns: dict[str, str]
    pivot: str
    split: str | None = None
    config: str | None = None
    languages: Sequence[str] = ()
    unpaired: bool = False


Reader = Callable[[Source], Iterator[RawExample]]


def last_number(text: str) -> str | None:
    """Return the last number in a text, normalized by `number_text`, or None. Accepts the digits of any script."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    digits = "".join(str(int(c)) if c.isdecimal() else c for c in numbers[-1]) if numbers else None
    return number_text(digits.rstrip(",")) if digits else None


def pivot_first(langs: Iterable[str], pivot: str) -> list[str]:
    """Return the pivot, then the other languages in alphabetical order."""
    return sorted(langs, key=lambda lang: (lang != pivot, lang))


def list_files(inputs: list[str], *patterns: str) -> list[Path]:
    """Return the named files, and the files in the named folders that match a pattern."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
            if not inside:
                raise UserError(f"{path}: this folder contains no {' or '.join(patterns)}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return files


def map_languages_to_files(files_by_language: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return the file of each language.

    Raises:
        UserError: two files are of the same language, so that one would replace the other.
    """
    files: dict[str, Path] = {}
    for lang, path in files_by_language:
        if lang in files:
            raise UserError(f"{path}: same name as {files[lang]}; convert one folder at a time")
        files[lang] = path
    return files


def read_objects(path: Path) -> Iterator[InputRow]:
    """Yield the rows of a JSON Lines or Parquet file. Raises UserError if a value is not a JSON object."""
    for row in read_file(path):
        if not isinstance(row.value, dict):
            raise UserError(f"{row.location}: not a JSON object")
        yield row

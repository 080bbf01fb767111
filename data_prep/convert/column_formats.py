"""Readers for tables and data sets whose columns hold the fields of a record."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.convert.examples import RawExample, Source, list_files, read_objects
from data_prep.parquet_rows import without_nulls
from data_prep.records import number_text
from pipeline.common.errors import UserError, first_line

_OPTIONAL = ("system", "reasoning_content", "tools", "answer_type", "choices")  # kept as they are
FIELDS = ("pair_id", "lang", "question", "answer", "messages", "gold", *_OPTIONAL)
LANG = "{lang}"  # stands for each of `Source.languages` in a column or configuration name

# Columns of other libraries that are used if a row has neither the first nor `messages`.
_QUESTIONS = ("question", "prompt", "instruction")
_ANSWERS = ("answer", "completion", "output", "translation")
_DISK_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")  # of a folder saved by the datasets library


class _Row(NamedTuple):
    """A row of a table.

    Attributes:
        location: File and row, for error messages.
        values: The row as a dictionary.
        row_id: The `pair_id` of the row if it holds several languages, or is unpaired, and has none of its own.
        lang: Language of the row, or None if a column holds it.
    """

    location: str
    values: dict[str, Any]
    row_id: str
    lang: str | None = None


def read_canonical(source: Source) -> Iterator[RawExample]:
    """Read JSON Lines, JSON arrays, CSV or Parquet with the canonical columns, or with those given in `columns`.

    Chat `messages` may have the keys role and content, or from and value. CSV and JSON files of a folder that also has
    JSON Lines or Parquet files are not read, because they often describe the data.
    """
    files: list[Path] = []
    for name in source.inputs:
        files += _list_tables(Path(name))
    for path, label in zip(files, _distinct_names(files, [path.stem for path in files]), strict=True):
        yield from _read_rows(read_table(path, label), source)


def _list_tables(path: Path) -> list[Path]:
    """Return a file, or the tables of a folder. Raises UserError if there are none, or the folder is of `datasets`."""
    tables, others = ("*.jsonl", "*.parquet"), ("*.csv", "*.json")
    patterns = next((some for some in (tables, others) if _matches(path, some)), tables + others)
    if patterns == others and _matches(path, others) <= set(_DISK_FILES):
        raise UserError(f"{path}: a folder saved by the datasets library; read it with --format datasets")
    return list_files([str(path)], *patterns)


def _matches(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    """Return the names in a folder that match a pattern."""
    return {file.name for pattern in patterns for file in folder.glob(pattern)}


def read_datasets(source: Source) -> Iterator[RawExample]:
    """Read a folder saved by the `datasets` library, or a dataset from the Hub or a folder, in the same columns.

    An input may name a configuration as NAME:CONFIG.

    Raises UserError if rows of several configurations correspond by their numbers, but not all have equally many.
    """
    paths = list(map(Path, source.inputs))
    labels = _distinct_names(paths, [path.name for path in paths])
    for full_name, label in zip(source.inputs, labels, strict=True):
        name, config = full_name, source.config or ""
        if not config and not Path(name).exists():
            name, _, config = name.partition(":")
        langs: list[str | None] = [*languages_of(source)] if LANG in config else [None]
        last_rows = dict.fromkeys(langs, 0)  # number of the last row without a `pair_id`, by language
        for lang in langs:
            rows = load_dataset(name, config.replace(LANG, lang or "") or None, source.split or "train", full_name)
            yield from _read_rows(_number_rows(rows, full_name, label, lang, last_rows, source), source)
        shortest, longest = (choose(langs, key=last_rows.__getitem__) for choose in (min, max))
        if last_rows[shortest] != last_rows[longest]:
            raise UserError(
                f"{full_name}: {last_rows[shortest]} rows in {shortest}, but {last_rows[longest]} in {longest}; rows "
                "must correspond, or have a column with their id: --columns pair_id=THEIRS"
            )


def _number_rows(
    rows: Iterable[dict[str, Any]],
    name: str,
    label: str,
    lang: str | None,
    last_rows: dict[str | None, int],
    source: Source,
) -> Iterator[_Row]:
    """Yield the rows of a dataset. Record in `last_rows` the number of the last one without a `pair_id`."""
    for number, values in enumerate(rows, start=1):
        if values.get(source.columns.get("pair_id", "pair_id")) is None:
            last_rows[lang] = number
        yield _Row(f"{name} row {number}", values, f"{label}-{number:09d}", lang)


def _distinct_names(paths: list[Path], names: list[str]) -> list[str]:
    """Return `names` if they distinguish the paths, or else as many of the last parts of each path as are needed."""
    paths = [path.absolute() for path in paths]
    length = 1
    while len(set(names)) < len(set(paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        length += 1
    return names


def load_dataset(name: str, config: str | None, split: str, label: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split of a dataset from a folder or the Hub. `label` names it in error messages.

    Raises UserError if the `datasets` library cannot load it, it has no such split, it is damaged, or a text is not
    valid UTF-8.
    """
    number = 0
    try:
        for row in _load_dataset(name, config, split):
            yield without_nulls(row)
            number += 1
    except UnicodeDecodeError as error:  # the library does not check texts before they are read
        raise UserError(f"{label} row {number + 1}: not valid UTF-8 ({error.reason})") from None


def _load_dataset(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    import datasets  # slow to import, only needed for this format

    on_disk = any((Path(name) / file).is_file() for file in _DISK_FILES)
    try:
        loaded = datasets.load_from_disk(name) if on_disk else datasets.load_dataset(name, config)
    except Exception as error:  # the library raises many types for a damaged folder or an unreachable Hub
        reason = first_line(error) or type(error).__name__
        raise UserError(f"{name}: cannot be loaded by the datasets library ({reason})") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{name}: no split {split!r}; there are {', '.join(loaded)}")
        loaded = loaded[split]
    if on_disk:
        try:
            loaded.data.validate(full=True)  # the library maps files of a folder into memory without checking them
        except pa.ArrowException as error:
            raise UserError(f"{name}: damaged ({first_line(error)})") from None
    return loaded


def read_table(path: Path, label: str) -> Iterator[_Row]:
    """Yield the rows of a JSON Lines, JSON array, CSV or Parquet file. `label` identifies the file in `row_id`."""
    with open(path, "rb") as file:
        is_array = path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if path.suffix == ".csv":
        rows = _read_csv(path)
    elif is_array:
        rows = _read_json_array(path)
    else:
        rows = ((row.location, row.value) for row in read_objects(path))
    for number, (location, values) in enumerate(rows, start=1):
        yield _Row(location, values, f"{label}-{number:09d}")


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=2):
                if None in row:
                    raise UserError(f"{path} row {number}: more fields than columns; quote fields that contain commas")
                yield f"{path} row {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({first_line(error)})") from None


def _read_json_array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        items = json.loads(path.read_text("utf-8-sig"), parse_float=Decimal)
    except (ValueError, RecursionError, ArithmeticError) as error:
        raise UserError(f"{path}: malformed JSON ({error})") from None
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise UserError(f"{path} item {number}: not a JSON object")
        yield f"{path} item {number}", item


def _read_rows(rows: Iterable[_Row], source: Source) -> Iterator[RawExample]:
    """Yield the examples of a table. A malformed one is yielded without content, so that it is counted.

    Raises the first error if the table has no well-formed example.
    """
    well_formed, first_error = False, ""
    for row in rows:
        for lang in _row_languages(row, source):
            try:
                yield _map_columns(row, lang, source)._replace(location=row.location)
                well_formed = True
            except UserError as error:
                first_error = first_error or f"{row.location}: {error}"
                lang_or_none = lang or row.values.get(source.columns.get("lang", "lang"))
                known = lang_or_none if isinstance(lang_or_none, str) and lang_or_none else "?"
                yield RawExample("", known, {}, None, "malformed")
    if first_error and not well_formed:
        raise UserError(first_error)


def _row_languages(row: _Row, source: Source) -> list[str | None]:
    """Return the languages of a row: several if it has a column or a dictionary entry for each."""
    if any(LANG in column for column in source.columns.values()):
        return [*languages_of(source)]
    answer = _find_text(row.values, source.columns, "answer", _ANSWERS)
    if isinstance(answer, dict):
        return [*answer]
    has_language = source.columns.get("lang", "lang") in row.values
    return [source.pivot if source.unpaired and row.lang is None and not has_language else row.lang]


def languages_of(source: Source) -> Sequence[str]:
    """Return the languages that `{lang}` stands for. Raises UserError if none are given."""
    if not source.languages:
        raise UserError(f"{LANG} in a column or configuration name needs --languages")
    return source.languages


def _find_text(row: dict[str, Any], columns: dict[str, str], name: str, aliases: tuple[str, ...]) -> Any:
    """Return the value of the column given for a field, or else of the first of its usual columns."""
    if name in columns:
        return row.get(columns[name])
    return next((row[alias] for alias in aliases if row.get(alias) is not None), None)


def _map_columns(row: _Row, lang: str | None, source: Source) -> RawExample:
    columns = {name: column.replace(LANG, lang or "") for name, column in source.columns.items()}
    record = {name: row.values.get(columns.get(name, name)) for name in FIELDS}
    for name, theirs in columns.items():
        if theirs not in row.values:
            raise UserError(f"no column {theirs!r} to use as {name}; the columns are {', '.join(map(str, row.values))}")
    if lang is not None:
        record["lang"] = lang
    if record["pair_id"] is None and (lang is not None or source.unpaired):
        record["pair_id"] = row.row_id
    if isinstance(record["pair_id"], float | Decimal):  # refused by `parse_record`, too
        name = columns.get("pair_id", "pair_id")
        raise UserError(f"`{name}` is {record['pair_id']}; write it as an integer or a string")
    for name in ("pair_id", "lang"):
        if record[name] is None or isinstance(record[name], list | dict | bool | float | Decimal) or record[name] == "":
            raise UserError(f"no `{name}`; name its column with --columns {name}=THEIRS")
    fields = _parse_texts(row.values, lang, columns, record["messages"])
    for name in _OPTIONAL:
        if record[name] not in (None, ""):
            fields[name] = record[name]
    gold = None if record["gold"] == "" else record["gold"]
    if isinstance(gold, list | dict | bool | bytes):  # their text would be compared with the answers of a model
        raise UserError(f"`{columns.get('gold', 'gold')}` is neither a string nor a number")
    if not (isinstance(gold, str) and record["answer_type"] == "text"):  # 007 and 1.50 are texts other than 7 and 1.5
        gold = number_text(gold)
    return RawExample(str(record["pair_id"]), str(record["lang"]), fields, gold)


def _parse_texts(row: dict[str, Any], lang: str | None, columns: dict[str, str], messages: Any) -> dict[str, Any]:
    """Return the question and answer of a row, or its messages."""
    if messages is not None:
        return {"messages": _parse_messages(messages)}
    question = _find_text(row, columns, "question", _QUESTIONS)
    answer = _find_text(row, columns, "answer", _ANSWERS)
    if isinstance(question, list) and isinstance(answer, list):
        return {"messages": _parse_messages(question + answer)}
    question, answer = (text.get(lang) if isinstance(text, dict) else text for text in (question, answer))
    if question is None and "translation" in row and "question" not in columns:
        question = ""  # plain translations are answers to an empty question, as in the format `parallel`
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError("neither `messages` nor the strings `question` and `answer`; see --columns")
    extra = row.get("input")
    if question == row.get("instruction") and isinstance(extra, str) and extra.strip():
        question = f"{question}\n\n{extra}"  # Alpaca's format
    return {"question": question, "answer": answer}


def _parse_messages(messages: Any) -> list[dict[str, Any]]:
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("`messages` is not a list of {role, content} or {from, value}")
    if all("from" in message for message in messages):
        messages = [{"role": roles.get(str(m["from"]), m["from"]), "content": m.get("value")} for m in messages]
    return messages

"""Readers of the benchmarks declared in `benchmarks`, from the files of their authors or from the Hub."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.convert.benchmarks import Benchmark, Row
from data_prep.convert.column_formats import LANG, languages_of, load_dataset, read_table
from data_prep.convert.examples import RawExample, Reader, Source, pivot_first
from data_prep.readers import read_lines
from data_prep.records import CHOICE_LETTERS, is_number, number_text
from pipeline.common.errors import UserError, first_line

_TABLES = (".json", ".jsonl", ".parquet")
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.)")  # in the names of the parts of a file of the Hub
_JSON_COLUMNS = ("tokens", "pronoun", "candidates")  # of the authors' XWinograd table


class _File(NamedTuple):
    """One file of a benchmark, or one configuration and split of its Hub dataset.

    Attributes:
        name: Path, or Hub ID with configuration and split.
        lang: Language code, or None if a column of its rows holds it.
        split: Split, or an empty string.
        rows: (location, row) of every row.
    """

    name: str
    lang: str | None
    split: str
    rows: Iterable[tuple[str, Row]]


def reader(name: str, benchmark: Benchmark) -> Reader:
    """Return a function that reads a benchmark. Its examples are grouped if translations share the row number."""

    def read(source: Source) -> Iterator[RawExample]:
        files = _find_files(name, benchmark, source)
        languages = {file.lang for file in files}
        if not benchmark.unpaired and source.pivot not in languages:
            known = ", ".join(sorted(map(str, languages)))
            raise UserError(f"{name}: no file of the pivot {source.pivot}; choose with --pivot one of {known}")
        if benchmark.key or benchmark.unpaired:
            return _read_keyed(name, benchmark, files, source.languages)
        return _read_aligned(name, benchmark, files, source.pivot)

    return read


def _read_keyed(name: str, benchmark: Benchmark, files: list[_File], languages: Sequence[str]) -> Iterator[RawExample]:
    for file in files:
        for number, (location, row) in enumerate(file.rows):
            lang = file.lang or _language_code(str(row.get("lang")), benchmark, location)
            if file.lang is None and languages and lang not in languages:
                continue
            row = _prepare(row, lang, benchmark, location)
            with_key = benchmark.key or f"{lang}-{file.split}{number:06d}"
            key = _fill(with_key, row, location)
            if key is None:
                raise UserError(f"{location}: no {benchmark.key}")
            yield _example(f"{name}-{key}", lang, row, benchmark, location)._replace(location=location)


def _read_aligned(name: str, benchmark: Benchmark, files: list[_File], pivot: str) -> Iterator[RawExample]:
    """Yield the examples of files whose rows correspond, pivot first.

    Raises UserError if the files of a split differ in length.
    """
    for split in dict.fromkeys(file.split for file in files):
        by_lang = {str(file.lang): file for file in files if file.split == split}
        langs = pivot_first(by_lang, pivot)
        for index, rows in enumerate(zip_longest(*(by_lang[lang].rows for lang in langs))):
            pivot_text = None
            for lang, located in zip(langs, rows, strict=True):
                if located is None:
                    raise UserError(
                        f"{by_lang[lang].name}: ends at row {index}, other files do not; rows must correspond"
                    )
                location, row = located
                example = _example(
                    f"{name}-{index:06d}", lang, _prepare(row, lang, benchmark, location), benchmark, location
                )
                text = row.get(benchmark.pivot_text, example.fields.get("question"))
                pivot_text = text if pivot_text is None else pivot_text
                if benchmark.pivot_text and text not in (pivot_text, example.fields.get("question")):
                    example = example._replace(drop_reason="other_english_question")
                yield example


def _prepare(row: Row, lang: str, benchmark: Benchmark, location: str) -> Row:
    try:
        return benchmark.prepare(row, lang)
    except UserError as error:
        raise UserError(f"{location}: {error}") from None


def _example(pair_id: str, lang: str, row: Row, benchmark: Benchmark, location: str) -> RawExample:
    """Return the example in a row. It is marked to be dropped if a text or the answer is missing.

    Raises UserError if the row is not one of the benchmark's.
    """
    if not benchmark.gold:  # parallel text, as in the format `parallel`
        text = _fill("{" + benchmark.header[0] + "}" if benchmark.header else "", row, location)
        return RawExample(pair_id, lang, {"question": "", "answer": (text or "").strip()}, None)
    gold = next((row[column] for column in benchmark.gold if row.get(column) is not None), None)
    if gold is None and not any(column in row for column in benchmark.gold):
        _fill("{" + benchmark.gold[0] + "}", row, location)
    question = _fill(benchmark.question, row, location)
    choices = [_fill(choice, row, location) for choice in benchmark.choices]
    if question is None or None in choices:
        return RawExample(pair_id, lang, {}, None, "text_missing")
    if gold in (None, "") or (choices and gold in (-1, "-1")):  # -1 marks a question whose option is not published
        return RawExample(pair_id, lang, {}, None, "answer_missing")
    if not choices:
        # PolyMath writes numbers as they are and other answers as $...$, MMATH both without dollars.
        answer = number_text(re.sub(r"^\$([^$]+)\$$", r"\1", str(gold).strip())) or ""
        answer_type = benchmark.answer_type or ("number" if is_number(answer) else "expression")
        fields = {"question": question, "answer": answer, "answer_type": answer_type}
        return RawExample(pair_id, lang, fields, answer)
    index = ord(str(gold)) - ord(benchmark.first_choice) if len(str(gold)) == 1 else -1
    if not 0 <= index < len(choices):
        raise UserError(f"{location}: `{benchmark.gold[0]}` is {str(gold)[:40]!a}, not one of {len(choices)} options")
    options = [f"{letter}. {text}" for letter, text in zip(CHOICE_LETTERS, choices, strict=False)]
    choice_fields = {
        "question": "\n".join([question, *options]),
        "answer": options[index],
        "answer_type": "choice",
        "choices": choices,
    }
    return RawExample(pair_id, lang, choice_fields, CHOICE_LETTERS[index])


def _fill(template: str, row: Row, location: str) -> str | None:
    """Fill a template with columns. Return None if one of them is empty.

    Raises UserError if there is no such column.
    """
    columns = re.findall(r"\{(\w+)\}", template)
    if missing := [column for column in columns if column not in row]:
        raise UserError(f"{location}: no column `{missing[0]}`; the columns are {', '.join(map(str, row))[:200]}")
    values = {column: "" if row[column] is None else str(row[column]).strip() for column in columns}
    return template.format(**values) if all(values.values()) else None


def _find_files(name: str, benchmark: Benchmark, source: Source) -> list[_File]:
    """Return the files of a benchmark in the input, or the configurations of its Hub dataset.

    Raises UserError if there are none, or two of the same language and split.
    """
    files: list[_File] = []
    splits = (source.split,) if source.split else benchmark.splits
    for entry in source.inputs:
        path = Path(entry)
        if path.is_dir():
            paths = sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            paths = [path]
        else:
            files += _hub_files(entry, benchmark, source, splits)
            continue
        found = [file for file in (_match(path.absolute(), benchmark, splits) for path in paths) if file]
        if not found:
            expected = " or ".join(benchmark.files).replace("{split}", "|".join(splits))
            raise UserError(f"{entry}: no file of {name}, which are named {expected}")
        there = {file.lang for file in found}
        if None not in there and (missing := set(source.languages) - there):
            raise UserError(f"{entry}: no file of {name} in {min(missing)}, which --languages names")
        files += [file for file in found if not source.languages or file.lang in (None, *source.languages)]
    seen: dict[tuple[str | None, str], _File] = {}
    for file in files:
        key = file.lang, file.split
        if other := seen.get(key):
            if file.name == other.name or _PART.sub("", file.name) != _PART.sub("", other.name):
                raise UserError(f"{file.name}: same name as {other.name}; convert one folder at a time")
            file = other._replace(rows=chain(other.rows, file.rows))
        seen[key] = file
    return list(seen.values())


def _match(path: Path, benchmark: Benchmark, splits: tuple[str, ...]) -> _File | None:
    for template in benchmark.files:
        pattern = re.escape(template).replace(r"\*", "[^/]*")
        pattern = pattern.replace(r"\{lang\}", f"(?P<lang>{benchmark.lang})", 1).replace(r"\{lang\}", "(?P=lang)")
        pattern = pattern.replace(r"\{split\}", f"(?P<split>{'|'.join(map(re.escape, splits))})", 1)
        pattern = pattern.replace(r"\{split\}", "(?P=split)")
        if match := re.search(f"/{pattern}$", path.as_posix()):
            groups = match.groupdict()
            lang = _language_code(groups["lang"], benchmark, str(path)) if "lang" in groups else None
            return _File(str(path), lang, groups.get("split", ""), _read_rows(path, benchmark))
    return None


def _hub_files(entry: str, benchmark: Benchmark, source: Source, splits: tuple[str, ...]) -> list[_File]:
    name, _, config = entry.partition(":")
    configs = [config]
    if not config:
        if source.config is None or LANG not in source.config:
            raise UserError(
                f"{entry}: no such file or folder; of a Hub dataset, give the configuration of every language: "
                f"NAME:CONFIG or --config {LANG} --languages ..."
            )
        configs = [source.config.replace(LANG, lang) for lang in languages_of(source)]
    files = []
    for config in configs:
        lang = _language_code(config, benchmark, entry)
        for split in splits:
            label = f"{name}:{config} {split}"
            files.append(_File(label, lang, split, _hub_rows(name, config, split, label)))
    return files


def _hub_rows(name: str, config: str, split: str, label: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(load_dataset(name, config, split, label), start=1):
        yield f"{label} row {number}", row


def _language_code(name: str, benchmark: Benchmark, location: str) -> str:
    """Return the code of a language by the name that a benchmark uses, which is a code itself in most benchmarks."""
    code = benchmark.languages.get(name, name)
    if code in benchmark.languages.values() or (code[:1].islower() and re.fullmatch(benchmark.lang, code)):
        return code
    raise UserError(f"{location}: unknown language {name!r}; known: {', '.join(benchmark.languages) or benchmark.lang}")


def _read_rows(path: Path, benchmark: Benchmark) -> Iterator[tuple[str, Row]]:
    if path.suffix in _TABLES:
        yield from ((row.location, row.values) for row in read_table(path, ""))
    elif benchmark.header is None:
        yield from _read_tsv(path, csv.QUOTE_MINIMAL if benchmark.quoted else csv.QUOTE_NONE)
    else:
        for line in read_lines(path):
            values = line.value.rsplit("\t", len(benchmark.header) - 1)  # the first column may contain tabs
            if len(values) != len(benchmark.header):
                raise UserError(f"{line.location}: not {' TAB '.join(benchmark.header).upper()}")
            yield line.location, _decode_columns(dict(zip(benchmark.header, values, strict=True)), line.location)


def _decode_columns(row: Row, location: str) -> Row:
    try:
        return {name: json.loads(value) if name in _JSON_COLUMNS else value for name, value in row.items()}
    except ValueError as error:
        raise UserError(f"{location}: malformed JSON ({error})") from None


def _read_tsv(path: Path, quoting: Any) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t", quoting=quoting), start=2):
                if None in row or None in row.values():
                    raise UserError(f"{path} row {number}: not as many fields as columns")
                yield f"{path} row {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a tab-separated file in UTF-8 ({first_line(error)})") from None

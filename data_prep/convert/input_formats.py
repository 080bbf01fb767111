"""Readers for the input formats of `convert`. Examples that are translations of each other get the same `pair_id`."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal, DecimalException
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.readers import InputRow, first_line, read_file, read_lines
from pipeline.common.errors import UserError

LANGUAGE_NAMES = {
    "English": "en", "Spanish": "es", "German": "de", "French": "fr", "Russian": "ru", "Chinese": "zh",
    "Japanese": "ja", "Thai": "th", "Swahili": "sw", "Bengali": "bn", "Telugu": "te",
}  # fmt: skip
MAX_EXPONENT = 10_000  # a number beyond 10^10000, such as 1e999999, stays text instead of a million digits
FIELDS = ("pair_id", "lang", "question", "answer", "messages", "system", "gold")


class RawExample(NamedTuple):
    """An example read from another format, before the checks against its group.

    Attributes:
        pair_id: Shared by the translations of one example.
        lang: Language code.
        fields: `question` and `answer`, or `messages`, and optionally `system`.
        gold: Final answer, or None if absent.
        drop_reason: Why the format marks the example as unusable, or an empty string.
    """

    pair_id: str
    lang: str
    fields: dict[str, Any]
    gold: str | None
    drop_reason: str = ""


class Source(NamedTuple):
    """The input of a conversion.

    Attributes:
        inputs: Files, folders or Hub dataset IDs.
        columns: Mapping from a name in `FIELDS` to the column name in the input, if the names differ.
        pivot: Language that the others are translations of.
        split: Split of a Hub dataset.
    """

    inputs: list[str]
    columns: dict[str, str]
    pivot: str
    split: str = "train"


Reader = Callable[[Source], Iterator[RawExample]]


def number_text(value: Any) -> str | None:
    """Normalize a gold answer to text, so that equal numbers give equal strings.

    For example, 8.0, "8" and " 8 " all become "8", and "8,000" becomes "8000". Numbers are exact decimals of any
    length. Other text is only stripped. None returns None.
    """
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = Decimal(text.replace(",", ""))
    except DecimalException:
        return text
    if not number.is_finite() or abs(number.adjusted()) > MAX_EXPONENT:
        return text
    digits = format(number, "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def last_number(text: str) -> str | None:
    """Return the last number in a text, normalized by `number_text`, or None. Accepts the digits of any script."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    digits = "".join(str(int(c)) if c.isdecimal() else c for c in numbers[-1]) if numbers else None
    return number_text(digits.rstrip(",")) if digits else None


def pivot_first(langs: Iterable[str], pivot: str) -> list[str]:
    """Return the pivot, then the other languages in alphabetical order."""
    return sorted(langs, key=lambda lang: (lang != pivot, lang))


def read_canonical(source: Source) -> Iterator[RawExample]:
    """Read JSON Lines or Parquet with the canonical columns, or with the column names given in `columns`.

    Chat `messages` may have the keys role and content, or from and value.
    """
    for path in _list_files(source.inputs, "*.jsonl", "*.parquet"):
        for row in _read_objects(path):
            yield row.apply(lambda columns: _map_columns(columns, source.columns))


def read_datasets(source: Source) -> Iterator[RawExample]:
    """Read a folder saved by the `datasets` library, or a dataset from the Hub."""
    import datasets  # slow to import, only needed for this format

    for name in source.inputs:
        try:
            loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
        except Exception as error:  # the library raises many types for a damaged folder or an unreachable Hub
            raise UserError(f"{name}: cannot be loaded by the datasets library ({first_line(error)})") from None
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise UserError(f"{name}: no split {source.split!r}; there are {', '.join(loaded)}")
            loaded = loaded[source.split]
        for number, row in enumerate(loaded, start=1):
            try:
                yield _map_columns(row, source.columns)
            except UserError as error:
                raise UserError(f"{name} row {number}: {error}") from None


def _map_columns(row: dict[str, Any], columns: dict[str, str]) -> RawExample:
    record = {name: row.get(columns.get(name, name)) for name in FIELDS}
    for name, theirs in columns.items():
        if theirs not in row:
            raise UserError(f"no column {theirs!r} to use as {name}; the columns are {', '.join(map(str, row))}")
    for name in ("pair_id", "lang"):
        if record[name] is None or isinstance(record[name], list | dict | bool | float | Decimal) or record[name] == "":
            raise UserError(f"no `{name}`; name its column with --columns {name}=THEIRS")
    if record["messages"] is not None:
        fields: dict[str, Any] = {"messages": _parse_messages(record["messages"])}
    elif isinstance(record["question"], str) and isinstance(record["answer"], str):
        fields = {"question": record["question"], "answer": record["answer"]}
    else:
        raise UserError("neither `messages` nor the strings `question` and `answer`; see --columns")
    if record["system"] is not None:
        fields["system"] = str(record["system"])
    return RawExample(str(record["pair_id"]), str(record["lang"]), fields, number_text(record["gold"]))


def _parse_messages(messages: Any) -> list[dict[str, Any]]:
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("`messages` is not a list of {role, content} or {from, value}")
    if all("from" in message for message in messages):
        messages = [{"role": roles.get(m["from"], m["from"]), "content": m.get("value")} for m in messages]
    return messages


def read_mgsm(source: Source) -> Iterator[RawExample]:
    """Read MGSM: files mgsm_{lang}.tsv with lines `question TAB answer`, in the same order in all languages.

    The answer is only the number.
    """
    files = {path.stem.removeprefix("mgsm_"): path for path in _list_files(source.inputs, "mgsm_*.tsv")}
    for index, lang, row in _read_aligned(files, read_lines, source.pivot):
        question, answer = row.apply(_split_at_last_tab)
        yield RawExample(f"mgsm-{index:06d}", lang, {"question": question, "answer": answer}, number_text(answer))


def _split_at_last_tab(line: str) -> tuple[str, str]:
    question, tab, answer = line.rpartition("\t")
    if not tab:
        raise UserError("not QUESTION TAB ANSWER")
    return question, answer


def read_msvamp(source: Source) -> Iterator[RawExample]:
    """Read MSVAMP: JSON Lines files test_{Language}.json. Rows are paired by the English question in each row."""
    files = {}
    for path in _list_files(source.inputs, "test_*.json"):
        name = path.stem.removeprefix("test_")
        if name not in LANGUAGE_NAMES:
            raise UserError(f"{path}: unknown language {name!r}; known: {', '.join(LANGUAGE_NAMES)}")
        files[LANGUAGE_NAMES[name]] = path
    english_questions: dict[int, str] = {}
    for index, lang, row in _read_aligned(files, _read_objects, source.pivot):
        question, gold = row.apply(lambda columns: _get_strings(columns, "m_query", "response"))
        english = row.value.get("query", question)
        first = english_questions.setdefault(index, english)
        drop_reason = "" if english in (first, question) else "other_english_question"
        answer = number_text(gold)
        yield RawExample(f"msvamp-{index:06d}", lang, {"question": question, "answer": answer}, answer, drop_reason)


def read_mcot(source: Source) -> Iterator[RawExample]:
    """Read mCoT outputs: files {lang}.jsonl with rows in the same order. `result` is true if the row is correct."""
    files = {path.stem: path for path in _list_files(source.inputs, "*.jsonl")}
    for index, lang, row in _read_aligned(files, _read_objects, source.pivot):
        prompt, response = row.apply(lambda columns: _get_strings(columns, "question", "response"))
        question = prompt.split("Question:\n", 1)[-1].rsplit("\nAnswer:", 1)[0].strip()
        fields = {"question": question, "answer": response.strip()}
        drop_reason = "" if row.value.get("result") is True else "wrong_answer"
        yield RawExample(f"mcot-{index:06d}", lang, fields, number_text(row.value.get("answer")), drop_reason)


def read_parallel(source: Source) -> Iterator[RawExample]:
    """Read line-aligned text files NAME.{lang}. Each line becomes the answer to an empty question."""
    stems: dict[str, dict[str, Path]] = {}
    for path in _list_files(source.inputs, "*.*"):
        stems.setdefault(path.stem, {})[path.suffix[1:]] = path
    for stem, files in stems.items():
        for index, lang, row in _read_aligned(files, read_lines, source.pivot):
            yield RawExample(f"{stem}-{index:09d}", lang, {"question": "", "answer": row.value.strip()}, None)


_PROMPT = re.compile(r"answer in (\w+)\.?\s+### Instruction:\n(.*?)\n\n### Response:", re.DOTALL)


def read_mathoctopus(source: Source) -> Iterator[RawExample]:
    """Read MathOctopus MGSM8KInstruct: rows {prompt, chosen} without ids.

    The prompt contains the language and the question.

    A row whose question also occurs in a pivot row (the Cross set) is paired with that row. Other rows (the Parallel
    set) are paired with the pivot question that has the same numbers and the same final answer. A row that matches
    several pivot questions is dropped.
    """
    files = _list_files(source.inputs, "*.json", "*.jsonl")
    rows = [row.apply(_parse_octopus) for path in files for row in _read_objects(path)]
    pivots = [(question, gold) for lang, question, _, gold in rows if lang == source.pivot]
    by_question = {question: number for number, (question, _) in enumerate(pivots)}
    signatures = Counter(_signature(question, gold) for question, gold in pivots)
    by_signature = {_signature(*pivot): number for number, pivot in enumerate(pivots)}
    for number, (lang, question, answer, gold) in enumerate(rows):
        signature, drop_reason = _signature(question, gold), ""
        match = by_question.get(question)
        if match is None and signatures[signature] > 1:
            drop_reason = "ambiguous_pair"
        elif match is None and (match := by_signature.get(signature)) is None:
            drop_reason = "no_pair_found"
        pair_id = f"octopus-{match:06d}" if not drop_reason else f"octopus-unpaired-{number:06d}"
        yield RawExample(pair_id, lang, {"question": question, "answer": answer}, gold, drop_reason)


def _parse_octopus(row: dict[str, Any]) -> tuple[str, str, str, str | None]:
    """Return the language, question, answer and gold answer of a row."""
    prompt, answer = _get_strings(row, "prompt", "chosen")
    match = _PROMPT.search(prompt)
    if not match or match[1] not in LANGUAGE_NAMES:
        raise UserError("the prompt names no known language; give the files of MGSM8KInstruct")
    return LANGUAGE_NAMES[match[1]], match[2].strip(), answer.strip(), last_number(answer)


def _signature(question: str, gold: str | None) -> tuple:
    """Return the sorted numbers in a question and its gold answer, as a key for matching."""
    numbers = (last_number(number) for number in re.findall(r"\d[\d,.]*", question))
    return tuple(sorted(filter(None, numbers))), gold


def _read_aligned(
    files: dict[str, Path], read: Callable[[Path], Iterable[InputRow]], pivot: str
) -> Iterator[tuple[int, str, InputRow]]:
    """Yield (row index, language, row) from files with aligned rows, pivot first.

    Raises UserError if the pivot's file is missing or the files differ in length.
    """
    if pivot not in files:
        raise UserError(f"no file of the pivot {pivot} among {', '.join(str(path) for path in files.values())}")
    langs = pivot_first(files, pivot)
    for index, rows in enumerate(zip_longest(*(read(files[lang]) for lang in langs))):
        for lang, row in zip(langs, rows, strict=True):
            if row is None:
                raise UserError(f"{files[lang]}: ends at row {index}, other files do not; their rows must correspond")
            yield index, lang, row


def _get_strings(row: dict[str, Any], first: str, second: str) -> tuple[str, str]:
    if not isinstance(row.get(first), str) or not isinstance(row.get(second), str):
        raise UserError(f"`{first}` and `{second}` must be strings")
    return row[first], row[second]


def _list_files(inputs: list[str], *patterns: str) -> list[Path]:
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


def _read_objects(path: Path) -> Iterator[InputRow]:
    """Yield the rows of a JSON Lines or Parquet file. Raises UserError if a value is not a JSON object."""
    for row in read_file(path):
        if not isinstance(row.value, dict):
            raise UserError(f"{row.location}: not a JSON object")
        yield row


# Formats whose readers yield the examples of each group consecutively, and formats whose readers do not.
Readers = dict[str, Reader]
GROUPED_FORMATS: Readers = {"mcot": read_mcot, "mgsm": read_mgsm, "msvamp": read_msvamp, "parallel": read_parallel}
SCATTERED_FORMATS: Readers = {"canonical": read_canonical, "datasets": read_datasets, "mathoctopus": read_mathoctopus}

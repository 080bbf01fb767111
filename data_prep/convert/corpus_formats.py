"""Readers for training corpora: worked answers of other projects and line-aligned text."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data_prep.convert.benchmarks import LANGUAGE_NAMES
from data_prep.convert.examples import (
    RawExample,
    Source,
    last_number,
    list_files,
    map_languages_to_files,
    pivot_first,
    read_objects,
)
from data_prep.readers import InputRow, read_lines
from data_prep.records import number_text
from pipeline.common.errors import UserError


def read_mcot(source: Source) -> Iterator[RawExample]:
    """Read mCoT outputs: files {lang}.jsonl with rows in the same order.

    If a row has a `result` that is not null, it must be true for the row to be kept.
    """
    files = map_languages_to_files((path.stem, path) for path in list_files(source.inputs, "*.jsonl"))
    for index, lang, row in _read_aligned(files, read_objects, source.pivot):
        prompt, response = row.apply(lambda columns: _get_strings(columns, "question", "response"))
        question = prompt.split("Question:\n", 1)[-1].rsplit("\nAnswer:", 1)[0].strip()
        fields = {"question": question, "answer": response.strip()}
        drop_reason = "" if row.value.get("result") in (None, True) else "wrong_answer"
        yield RawExample(f"mcot-{index:06d}", lang, fields, number_text(row.value.get("answer")), drop_reason)


def read_parallel(source: Source) -> Iterator[RawExample]:
    """Read line-aligned text files NAME.{lang}. Each line becomes the answer to an empty question."""
    stems: dict[str, list[Path]] = {}
    for path in list_files(source.inputs, "*.*"):
        stems.setdefault(path.stem, []).append(path)
    for stem, paths in stems.items():
        files = map_languages_to_files((path.suffix[1:], path) for path in paths)
        for index, lang, row in _read_aligned(files, read_lines, source.pivot):
            yield RawExample(f"{stem}-{index:09d}", lang, {"question": "", "answer": row.value.strip()}, None)


# Marks between the digits of a number differ between languages: 1,200.5 is 1.200,5 or 1 200,5.
_NUMBER = re.compile(r"\d{1,3}(?:[ \u00a0\u202f'’]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*")
_PROMPT = re.compile(r"answer in (\w+)\.?\s+### Instruction:\n(.*?)\n\n### Response:", re.DOTALL)


def read_mathoctopus(source: Source) -> Iterator[RawExample]:
    """Read MathOctopus MGSM8KInstruct: rows {prompt, chosen} without ids.

    The prompt contains the language and the question.

    A row whose question also occurs in a pivot row (the Cross set) is paired with that row. Other rows (the Parallel
    set) are paired with the pivot question that has the same numbers and the same final answer, compared by their
    digits. A row that matches several pivot questions is dropped.
    """
    files = list_files(source.inputs, "*.json", "*.jsonl")
    rows = [row.apply(_parse_octopus) for path in files for row in read_objects(path)]
    pivots = [(question, answer, gold) for lang, question, answer, gold in rows if lang == source.pivot]
    by_question = {question: number for number, (question, *_) in enumerate(pivots)}
    signatures = Counter(_signature(question, answer) for question, answer, _ in pivots)
    by_signature = {_signature(question, answer): number for number, (question, answer, _) in enumerate(pivots)}
    for number, (lang, question, answer, gold) in enumerate(rows):
        signature, drop_reason = _signature(question, answer), ""
        match = by_question.get(question)
        if match is None and signatures[signature] > 1:
            drop_reason = "ambiguous_pair"
        elif match is None and (match := by_signature.get(signature)) is None:
            drop_reason = "no_pair_found"
        if match is not None and _digits(answer)[-1:] == _digits(pivots[match][1])[-1:]:
            gold = pivots[match][2]  # the same number, in English notation
        pair_id = f"octopus-{match:06d}" if not drop_reason else f"octopus-unpaired-{number:06d}"
        yield RawExample(pair_id, lang, {"question": question, "answer": answer}, gold, drop_reason)


def _parse_octopus(row: dict[str, Any]) -> tuple[str, str, str, str | None]:
    """Return the language, question, answer and gold answer of a row."""
    prompt, answer = _get_strings(row, "prompt", "chosen")
    match = _PROMPT.search(prompt)
    if not match or match[1] not in LANGUAGE_NAMES:
        raise UserError("the prompt names no known language; give the files of MGSM8KInstruct")
    return LANGUAGE_NAMES[match[1]], match[2].strip(), answer.strip(), last_number(answer)


def _signature(question: str, answer: str) -> tuple[str, ...]:
    """Return the final number of an answer and the sorted numbers in its question, as a key for matching."""
    return (*_digits(answer)[-1:], *sorted(_digits(question)))


def _digits(text: str) -> list[str]:
    """Return the digits of each number in a text, as ASCII and without marks."""
    numbers = _NUMBER.findall(text)
    return ["".join(str(int(char)) for char in number if char.isdecimal()) for number in numbers]


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

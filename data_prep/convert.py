"""Other formats to canonical JSON Lines: pairs are formed, and groups that do not hold together dropped and counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.records import record_line
from data_prep.shards import write_atomically


@dataclass
class Report:
    """What a conversion kept and dropped: records per language, groups, drops per (language, reason)."""

    kept: Counter = field(default_factory=Counter)
    groups: int = 0
    drops: Counter = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report as text."""
        kept = ", ".join(f"{lang} {number}" for lang, number in sorted(self.kept.items()))
        drops = [f"dropped {number} {lang} ({reason})" for (lang, reason), number in sorted(self.drops.items())]
        return [f"{self.groups} groups, {self.kept.total()} records: {kept}", *drops]


Lines = Iterator[str]  # canonical JSON lines, the members of a group together


def convert(form: str, inputs: list[Path], output: Path, pivot: str) -> Report:
    """Convert `inputs` of a format named in FORMATS. Raises UserError for input that is not of that format."""
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}; known: {', '.join(sorted(FORMATS))}")
    report = Report()
    lines = list(FORMATS[form](inputs, pivot, report))
    if not lines:
        raise UserError(
            f"{', '.join(map(str, inputs))}: no pair could be formed ({'; '.join(report.lines()[1:]) or 'empty'})"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "".join(lines).encode())
    return report


def _mcot(inputs: list[Path], pivot: str, report: Report) -> Lines:
    """mCoT outputs, {lang}.jsonl: row i answers one problem everywhere; kept where right in pivot and translation."""
    rows = {path.stem: _read_jsonl(path) for path in _files(inputs, "*.jsonl")}
    if pivot not in rows:
        raise UserError(f"{inputs[0]}: no {pivot}.jsonl, the pivot's file")
    lengths = {lang: len(found) for lang, found in rows.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{inputs[0]}: files of different lengths, rows do not correspond: {lengths}")
    for number, base in enumerate(rows[pivot]):
        members = {lang: rows[lang][number] for lang in sorted(rows)}
        if not base.get("result"):
            report.drops.update((lang, "pivot_wrong") for lang in members)
            continue
        members = {lang: row for lang, row in members.items() if _right(row, base, lang, report)}
        if len(members) > 1:
            report.groups += 1
        for lang in sorted(members, key=lambda lang: lang != pivot):
            if len(members) == 1:
                report.drops[lang, "no_translation"] += 1
                continue
            report.kept[lang] += 1
            row = members[lang]
            gold = format_number(row["answer"])
            yield record_line(f"{number:06d}", lang, _bare_question(row["question"]), row["response"].strip(), gold)


def _right(row: dict[str, Any], base: dict[str, Any], lang: str, report: Report) -> bool:
    if row.get("answer") != base.get("answer"):
        report.drops[lang, "gold_differs"] += 1
    elif not row.get("result"):
        report.drops[lang, "wrong"] += 1
    else:
        return True
    return False


def _bare_question(prompt: str) -> str:
    """The problem alone, out of "Question:\\n...\\nAnswer:\\n..."."""
    return prompt.split("Question:\n", 1)[-1].rsplit("\nAnswer:", 1)[0].strip()


def format_number(value: Any) -> str:
    """A number as a person writes it: 8.0 becomes 8."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _files(inputs: list[Path], pattern: str) -> list[Path]:
    """The files named, and those that match in the folders named."""
    found = []
    for path in inputs:
        if path.is_dir():
            found += sorted(path.glob(pattern))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not found:
        raise UserError(f"{inputs[0]}: no {pattern} in it")
    return found


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            raise UserError(f"{path} row {number}: malformed JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: not a JSON object")
        rows.append(row)
    return rows


FORMATS: dict[str, Callable[[list[Path], str, Report], Lines]] = {"mcot": _mcot}

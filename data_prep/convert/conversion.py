"""Other formats to canonical JSON Lines: pairs are formed; what does not hold together is dropped and counted."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.convert.input_formats import IN_GROUPS, SCATTERED, Found, Source
from data_prep.records import parse_record
from pipeline.common.errors import UserError

FORMATS = sorted({**IN_GROUPS, **SCATTERED})
BUCKETS = 64  # scattered records are sorted into so many files, of which one at a time is held in memory


@dataclass
class Report:
    """What a conversion kept and dropped: records per language, groups, drops per (reason, language)."""

    kept: Counter = field(default_factory=Counter)
    groups: int = 0
    drops: Counter = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report as text: a line of what was kept, a line per reason of drops."""

        def told(counts: Iterable[tuple[str, int]]) -> str:
            return ", ".join(f"{lang} {number}" for lang, number in sorted(counts))

        lines = [f"{self.groups} groups, {self.kept.total()} records: {told(self.kept.items())}"]
        for reason in sorted({reason for reason, _ in self.drops}):
            found = [(lang, number) for (other, lang), number in self.drops.items() if other == reason]
            lines.append(f"dropped {sum(number for _, number in found)}, {reason}: {told(found)}")
        return lines


def convert(form: str, source: Source, output: Path) -> Report:
    """Convert a format of FORMATS to canonical JSON Lines at `output`, written whole or not at all.

    A group loses members that the format calls wrong, whose gold answer is not the pivot's, whose response is empty,
    which are malformed, or whose language it has already; a group without pivot or without translation goes whole.
    Raises UserError for input that is not of that format, and where nothing is left.
    """
    report = Report()
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as folder:
            groups: Iterator[list[Found]]
            if form in IN_GROUPS:
                groups = (list(group) for _, group in groupby(IN_GROUPS[form](source), key=lambda found: found.pair_id))
            else:
                groups = _gather(SCATTERED[form](source), Path(folder))
            with open(temporary, "w", encoding="utf-8") as file:
                for group in groups:
                    for found in _keep(group, source.pivot, report):
                        file.write(json.dumps(_record(found), ensure_ascii=False) + "\n")
        if not report.groups:
            raise UserError(
                f"{source.inputs[0]}: no pair could be formed; {'; '.join(report.lines()[1:]) or 'no records'}"
            )
        os.replace(temporary, output)
    except UnicodeEncodeError:
        raise UserError(f"{source.inputs[0]}: text that is not valid Unicode (a lone surrogate)") from None
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}; mend it and run again") from None
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _gather(records: Iterable[Found], folder: Path) -> Iterator[list[Found]]:
    """Groups of records that come in any order, through files, so that memory holds one bucket at a time."""
    files = [open(folder / str(number), "w+", encoding="utf-8") for number in range(BUCKETS)]  # noqa: SIM115
    try:
        for found in records:
            digest = hashlib.blake2b(found.pair_id.encode("utf-8", "surrogatepass"), digest_size=4).digest()
            files[int.from_bytes(digest, "big") % BUCKETS].write(json.dumps(found) + "\n")
        for file in files:
            file.seek(0)
            groups: dict[str, list[Found]] = {}
            for line in file:
                found = Found(*json.loads(line))
                groups.setdefault(found.pair_id, []).append(found)
            yield from groups.values()
    finally:
        for file in files:
            file.close()


def _keep(group: list[Found], pivot: str, report: Report) -> list[Found]:
    """The members that hold together, the pivot first; the others go to the report."""
    members: dict[str, Found] = {}
    for found in group:
        fault = found.fault or _fault(found)
        if not fault and found.lang in members:
            fault = "language_twice"
        if fault:
            report.drops[fault, found.lang] += 1
        else:
            members[found.lang] = found
    base = members.get(pivot)
    if base is None:
        report.drops.update(("no_pivot", lang) for lang in members)
        return []
    for lang, found in list(members.items()):
        if found.gold != base.gold and None not in (found.gold, base.gold):
            report.drops["gold_differs", lang] += 1
            del members[lang]
    if len(members) == 1:
        report.drops["no_translation", pivot] += 1
        return []
    report.groups += 1
    report.kept.update(list(members))
    return [members[lang] for lang in sorted(members, key=lambda lang: (lang != pivot, lang))]


def _fault(found: Found) -> str:
    messages = found.fields.get("messages")
    response = messages[-1].get("content") if messages else found.fields.get("answer")
    if messages is not None and (not messages or messages[-1].get("role") != "assistant"):
        return "no_response"
    if not isinstance(response, str) or not response.strip():
        return "empty_response"
    try:
        parse_record(_record(found))  # what we write, others must accept
    except UserError:
        return "malformed"
    return ""


def _record(found: Found) -> dict[str, Any]:
    record = {"pair_id": found.pair_id, "lang": found.lang, **found.fields}
    if found.gold is not None:
        record["gold"] = found.gold
    return record

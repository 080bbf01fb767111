"""Convert other formats to canonical JSON Lines. Examples are grouped by translation; inconsistent ones are dropped."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from data_prep.convert.examples import RawExample, Source, pivot_first
from data_prep.convert.input_formats import GROUPED_FORMATS, SCATTERED_FORMATS, is_unpaired
from data_prep.records import (
    format_record,
    has_visible_text,
    is_number,
    json_number,
    parse_record,
    spelling_error,
    to_json_line,
)
from pipeline.common.errors import UserError

FORMATS = sorted({**GROUPED_FORMATS, **SCATTERED_FORMATS})
BUCKETS = 64  # number of bucket files; one bucket at a time is in memory


@dataclass
class ConversionReport:
    """Counts of the records that a conversion kept and dropped.

    Attributes:
        kept: Number of records per language.
        groups: Number of groups.
        drops: Number of dropped examples per (reason, language).
    """

    kept: Counter = field(default_factory=Counter)
    groups: int = 0
    drops: Counter = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Format the report as text: one line for the kept records, then one line per drop reason."""

        def format_counts(counts: Iterable[tuple[str, int]]) -> str:
            return ", ".join(f"{lang} {number}" for lang, number in sorted(counts))

        lines = [f"{self.groups} groups, {self.kept.total()} records: {format_counts(self.kept.items())}"]
        for reason in sorted({reason for reason, _ in self.drops}):
            counts = [(lang, number) for (other, lang), number in self.drops.items() if other == reason]
            lines.append(f"dropped {sum(number for _, number in counts)}, {reason}: {format_counts(counts)}")
        return lines


def convert(format_name: str, source: Source, output: Path) -> ConversionReport:
    """Convert input files to canonical JSON Lines. The output file is written completely or not at all.

    An example is dropped if the format marks it as unusable, its gold answer differs from the pivot's, its response is
    empty, it is malformed, or its group already has an example in its language. A group without a pivot is dropped
    entirely, and so is a group without a translation unless `source.unpaired`.

    Args:
        format_name: One of `FORMATS`.
        source: The inputs and how to read them.
        output: JSON Lines file to write.

    Returns:
        The counts of kept and dropped examples.

    Raises:
        UserError: The input is not in that format, no group remains, or a language code is spelled in two ways.
    """
    report = ConversionReport()
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as folder:
            groups: Iterator[list[RawExample]]
            if format_name in GROUPED_FORMATS:
                examples = GROUPED_FORMATS[format_name](source)
                groups = (list(group) for _, group in groupby(examples, key=lambda example: example.pair_id))
            else:
                groups = _group_on_disk(SCATTERED_FORMATS[format_name](source), Path(folder))
            with open(temporary, "w", encoding="utf-8") as file:
                for group in groups:
                    if is_unpaired(format_name):
                        source = source._replace(pivot=group[0].lang, unpaired=True)
                    for example in _keep_consistent(group, source, report):
                        _write(example, file)
        if not report.groups:
            raise UserError(
                f"{source.inputs[0]}: no pair could be formed; {'; '.join(report.lines()[1:]) or 'no records'}"
            )
        if error := spelling_error([*report.kept, *(lang for _, lang in report.drops)]):
            raise UserError(f"{source.inputs[0]}: {error}")
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}; fix it and run again") from None
    finally:
        with suppress(OSError):  # the error above is the one to report
            temporary.unlink(missing_ok=True)
    return report


def _group_on_disk(examples: Iterable[RawExample], folder: Path) -> Iterator[list[RawExample]]:
    """Group examples by `pair_id`.

    The input may be in any order. Examples are spilled to bucket files so that only one bucket is in memory at a time.
    """
    files = [open(folder / str(number), "w+", encoding="utf-8") for number in range(BUCKETS)]  # noqa: SIM115
    try:
        for example in examples:
            digest = hashlib.blake2b(example.pair_id.encode("utf-8", "surrogatepass"), digest_size=4).digest()
            try:
                line = json.dumps(example, default=json_number)
            except UserError as error:
                raise UserError(f"{_describe(example)}: {error}") from None
            files[int.from_bytes(digest, "big") % BUCKETS].write(f"{line}\n")
        for file in files:
            file.seek(0)
            groups: dict[str, list[RawExample]] = {}
            for line in file:
                example = RawExample(*json.loads(line))
                groups.setdefault(example.pair_id, []).append(example)
            yield from groups.values()
    finally:
        for file in files:
            file.close()


def _keep_consistent(group: list[RawExample], source: Source, report: ConversionReport) -> list[RawExample]:
    """Return the consistent examples of a group, pivot first. The others are counted in the report."""
    pivot, members = source.pivot, dict[str, RawExample]()
    for example in group:
        reason = example.drop_reason or _find_error(example)
        if not reason and example.lang in members:
            _check_same_example(members[example.lang], example)
            reason = "language_twice"
        if reason:
            report.drops[reason, example.lang] += 1
        else:
            members[example.lang] = example
    base = members.get(pivot)
    if base is None:
        report.drops.update(("no_pivot", lang) for lang in members)
        return []
    for lang, example in list(members.items()):
        if _golds_differ(example, base):
            report.drops["gold_differs", lang] += 1
            del members[lang]
    if len(members) == 1 and not source.unpaired:
        report.drops["no_translation", pivot] += 1
        return []
    report.groups += 1
    report.kept.update(list(members))
    return [members[lang] for lang in pivot_first(members, pivot)]


def _golds_differ(example: RawExample, pivot: RawExample) -> bool:
    """Return whether two examples have different golds. Expressions and texts may be translated."""
    golds = (example.gold, pivot.gold)
    translated = pivot.fields.get("answer_type") in ("expression", "text")
    return golds[0] != golds[1] and None not in golds and not (translated and not all(map(is_number, golds)))


def _check_same_example(first: RawExample, second: RawExample) -> None:
    """Check that two examples of one `pair_id` and language do not come from files that use the id for different ones.

    Raises:
        UserError: they are in different files and differ.
    """
    files = {example.location.rsplit(" ", 2)[0] for example in (first, second)}
    if len(files) == 2 and first.fields != second.fields:
        raise UserError(
            f"{second.location}: pair_id {second.pair_id!r} is another example in {first.location}; pair_ids must be "
            "unique across files, except for translations of the same example"
        )


def _find_error(example: RawExample) -> str:
    """Return why an example cannot become a canonical record, or an empty string if it can."""
    messages = example.fields.get("messages")
    response = messages[-1].get("content") if messages else example.fields.get("answer")
    if messages is not None and (not messages or messages[-1].get("role") != "assistant"):
        return "no_response"
    if not isinstance(response, str) or not has_visible_text(response):
        return "empty_response"
    try:
        parse_record(_to_record(example))  # ensure that the written record can be read back
    except UserError:
        return "malformed"
    return ""


def _write(example: RawExample, file: TextIO) -> None:
    """Write an example as a canonical record. Raises UserError if a text is not valid Unicode."""
    try:
        file.write(to_json_line(_to_record(example)))
    except UnicodeEncodeError:
        raise UserError(f"{_describe(example)}: text that is not valid Unicode (a lone surrogate)") from None


def _describe(example: RawExample) -> str:
    """Return the `pair_id` and language of an example, after its file and row if they are known."""
    location = f"{example.location}: " if example.location else ""
    return f"{location}pair_id {example.pair_id} ({example.lang})"


def _to_record(example: RawExample) -> dict[str, Any]:
    return format_record(example.pair_id, example.lang, example.fields, example.gold)

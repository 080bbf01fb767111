"""Records whose representations are measured: questions with answers in several languages, or parallel text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.readers import read_file
from data_prep.records import Record, has_visible_text, read_records
from pipeline.common.errors import UserError

MIN_GROUPS = 5
Answer = tuple[str, str]  # pair_id, lang


@dataclasses.dataclass(frozen=True)
class ParallelRecords:
    """Records of the questions that exist in every language.

    Attributes:
        records: ordered by language and with the questions in the same order in each language.
        languages: the languages in alphabetical order.
        left_out: number of questions omitted because they are missing in some language.
    """

    records: list[Record]
    languages: list[str]
    left_out: int

    @property
    def pair_ids(self) -> list[str]:
        """The IDs of the questions, in the order of the records."""
        return [record.pair_id for record in self.records[: len(self.records) // len(self.languages)]]


def read_parallel_records(path: Path, limit: int | None) -> ParallelRecords:
    """Read the records of the questions that exist in every language.

    Args:
        path: JSON Lines or Parquet file of canonical records with written-out answers.
        limit: use only the first `limit` questions.

    Raises:
        UserError: a record is malformed, there is only one language, or too few questions exist in every language.
    """
    if limit is not None and limit < MIN_GROUPS:
        raise UserError(f"--limit {limit}: at least {MIN_GROUPS} questions are needed")
    return _complete(read_records([path]), f"{path}", limit)


def own_answers(parallel: ParallelRecords, path: Path) -> ParallelRecords:
    """Replace the answers by those that a model generated.

    Questions to which it gave no answer in some language are left out. Of several answers the first is used.

    Args:
        parallel: the questions.
        path: `generations.jsonl`, written by `pipeline.evaluation` for the same data.

    Raises:
        UserError: the file is malformed, or too few questions have an answer in every language.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; python -m pipeline.evaluation writes it")
    outputs: dict[Answer, str] = {}
    for row in read_file(path):
        key, output = row.apply(_generation)
        outputs.setdefault(key, output)
    found = [
        record._replace(messages=[*record.messages[:-1], {"role": "assistant", "content": output}])
        for record in parallel.records
        if has_visible_text(output := outputs.get((record.pair_id, record.lang), ""))
    ]
    if not found:
        raise UserError(f"{path}: no answer to a question of --data; evaluate the model on the same file")
    return _complete(found, str(path), None, parallel.languages)


def _generation(row: Any) -> tuple[Answer, str]:
    names = ("pair_id", "lang", "output")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
        raise UserError("not a row of generations.jsonl, which has the strings `pair_id`, `lang` and `output`")
    return (row["pair_id"], row["lang"]), row["output"]


def _complete(records: Any, source: str, limit: int | None, languages: Sequence[str] | None = None) -> ParallelRecords:
    by_lang: dict[str, dict[str, Record]] = {lang: {} for lang in languages or ()}
    order: dict[str, None] = {}
    for record in records:
        by_lang.setdefault(record.lang, {}).setdefault(record.pair_id, record)
        order.setdefault(record.pair_id)
    if len(by_lang) < 2:
        raise UserError(f"{source}: only one language; similarity needs the same questions in two or more")
    complete = [pair_id for pair_id in order if all(pair_id in of_lang for of_lang in by_lang.values())]
    if len(complete) < MIN_GROUPS:
        least = min(by_lang, key=lambda lang: len(by_lang[lang]))
        raise UserError(
            f"{source}: {len(complete)} questions exist in every language, at least {MIN_GROUPS} are needed; "
            f"{least} has the fewest records ({len(by_lang[least])})"
        )
    kept = complete[:limit]
    ordered = [by_lang[lang][pair_id] for lang in sorted(by_lang) for pair_id in kept]
    return ParallelRecords(ordered, sorted(by_lang), len(order) - len(complete))

"""Derive the training data of an ablation or a baseline from canonical records.

`shuffled_pairs`: every translation is paired with the pivot of another example. The texts are the same, so a method
that gains as much from these pairs as from the true ones does not use the pairing.

`question_translation`: for every translation, a record is added that asks for the pivot's question, given the question
in the other language. This is the supervision of QAlign (arXiv 2401.07817), from the same pairs.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.records import Record, format_record, read_records, to_json_line
from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional

KINDS = ("shuffled_pairs", "question_translation")
PROMPT = "Translate this question from {source} into {target}.\n\n{question}"


def derive(kind: str, inputs: list[Path], output: Path, pivot: str = "en", seed: int = 0) -> dict[str, int]:
    """Write derived records to a JSON Lines file, completely or not at all.

    Args:
        kind: one of `KINDS`.
        inputs: canonical records.
        output: JSON Lines file to write. It replaces the inputs in `pack`.
        pivot: language that the others are translations of.
        seed: determines the pairs of `shuffled_pairs`.

    Returns:
        The numbers of records `written` and of those that were `changed` or added.

    Raises:
        UserError: a record is malformed, none is in the pivot language, a language has too few translations to
            shuffle, or the file cannot be written.
    """
    if kind == "shuffled_pairs":
        records = _shuffle_pairs(inputs, pivot, seed)
    else:
        records = _add_question_translations(inputs, pivot)
    temporary = output.with_name(output.name + ".tmp")
    counts = {"written": 0, "changed": 0}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            for record, changed in records:
                file.write(to_json_line(record))
                counts["written"] += 1
                counts["changed"] += changed
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}; give another --output") from None
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _format(record: Record, pair_id: str, gold: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"messages": record.messages}
    if record.tools:
        fields["tools"] = record.tools
    return format_record(pair_id, record.lang, fields, gold)


def _shuffle_pairs(inputs: list[Path], pivot: str, seed: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """Permute the `pair_id`s of the translations within each language, without a fixed point.

    Each example keeps its set of languages. Gold answers are removed, as those of a group would differ.
    """
    ids: dict[str, dict[str, None]] = {}
    has_pivot = False
    for record in read_records(inputs):
        if record.lang == pivot:
            has_pivot = True
        else:
            ids.setdefault(record.lang, {})[record.pair_id] = None
    rng, others = np.random.default_rng(seed), {}
    _check_pivot(has_pivot, inputs, pivot)
    for lang in sorted(ids):
        if len(ids[lang]) < 2:
            raise UserError(f"{inputs[0]}: a single translation in {lang}; shuffling pairs takes two or more")
        order = rng.permutation(sorted(ids[lang])).tolist()
        others[lang] = dict(zip(order, [*order[1:], order[0]], strict=True))  # one cycle: no example keeps its own
    for record in read_records(inputs):
        changed = record.lang != pivot
        pair_id = others[record.lang][record.pair_id] if changed else record.pair_id
        yield _format(record, pair_id, None), changed


def _add_question_translations(inputs: list[Path], pivot: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield all records, each translation followed by the task to translate its question into the pivot's language.

    An added record is an example of its own without a translation, so it is trained on without alignment.
    """
    questions = {record.pair_id: _question(record) for record in read_records(inputs) if record.lang == pivot}
    _check_pivot(bool(questions), inputs, pivot)
    target = _language_name(pivot)
    for record in read_records(inputs):
        yield _format(record, record.pair_id, record.gold), False
        question, answer = _question(record), questions.get(record.pair_id)
        if record.lang != pivot and question and answer:
            prompt = PROMPT.format(source=_language_name(record.lang), target=target, question=question)
            fields = {"question": prompt, "answer": answer}
            yield format_record(f"{record.pair_id}#translate-{record.lang}", pivot, fields, None), True


def _check_pivot(has_pivot: bool, inputs: list[Path], pivot: str) -> None:
    if not has_pivot:
        raise UserError(f"{inputs[0]}: no record in the language {pivot}; give the language of the pivots as --pivot")


def _question(record: Record) -> str | None:
    """Return the last message of the user, or None if there is none."""
    texts = [message["content"] for message in record.messages if message["role"] == "user"]
    return texts[-1] if texts and texts[-1].strip() else None


def _language_name(code: str) -> str:
    """Return the English name of a language, or its code if it has none in CLDR."""
    names = import_optional("babel").Locale("en").languages
    return str(names.get(code.replace("-", "_").split("_")[0].lower(), code))

"""The problems that an evaluation asks: canonical records with a number as gold answer."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.records import parse_record
from pipeline.common.errors import UserError
from pipeline.evaluation.answer_extraction import LANGUAGES, parse_gold


class Problem(NamedTuple):
    """One record to answer: `messages` is the conversation up to the response, `gold` the right number."""

    pair_id: str
    lang: str
    messages: list[dict[str, str]]
    gold: Decimal


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSON Lines file of canonical records, of the first `limit` pair ids only if given.

    The written-out answer may be absent. Raises UserError naming file and row for a bad record.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data takes JSON Lines of records {{pair_id, lang, question, gold}}")
    problems: dict[tuple[str, str], Problem] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            problem = _parse_problem(line)
            if (problem.pair_id, problem.lang) in problems:
                raise UserError(f"pair_id {problem.pair_id!r} has two records in language {problem.lang!r}; keep one")
        except UserError as error:
            raise UserError(f"{path} row {row}: {error}") from None
        problems[problem.pair_id, problem.lang] = problem
    if not problems:
        raise UserError(f"{path}: empty file; nothing to evaluate")
    kept = set(list(dict.fromkeys(pair_id for pair_id, _ in problems))[:limit])
    return [problem for problem in problems.values() if problem.pair_id in kept]


def _parse_problem(line: str) -> Problem:
    try:
        raw: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"malformed JSON ({error})") from None
    record = parse_record(_with_placeholder(raw) if isinstance(raw, dict) else raw)
    if record.lang not in LANGUAGES:
        raise UserError(f"unknown language {record.lang!r}; answers can be read in {', '.join(LANGUAGES)}")
    gold = parse_gold(raw.get("gold"))
    if gold is None:
        raise UserError("`gold` is absent or no number; evaluation needs the final answer there, for instance 42")
    if len(record.messages) < 2:
        raise UserError("no message before the response; evaluation needs a question")
    return Problem(record.pair_id, record.lang, record.messages[:-1], gold)


def _with_placeholder(raw: dict[str, Any]) -> dict[str, Any]:
    """`parse_record` wants a written-out response, which test data need not have: a placeholder takes its place."""
    messages = raw.get("messages")
    if not isinstance(messages, list):
        return {**raw, "answer": "-"}
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return {**raw, "messages": [*messages, {"role": "assistant", "content": "-"}]}

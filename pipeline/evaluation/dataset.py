"""Read evaluation examples: canonical records with a gold answer."""

from pathlib import Path
from typing import Any, NamedTuple

from data_prep.readers import read_inputs
from data_prep.records import parse_record, spelling_error
from pipeline.common.errors import UserError
from pipeline.evaluation.answers.answer_types import parse_gold
from pipeline.evaluation.answers.candidates import Answer


class Example(NamedTuple):
    """A question in one language with its gold answer.

    Attributes:
        pair_id: shared by all translations of the question, which form an example group.
        lang: language code.
        messages: the conversation before the response; each message has `role` and `content`.
        gold: the correct answer, in the canonical form of its type.
        answer_type: number, expression, choice or text.
        choices: texts of the options if the answer is one of several.
        tools: JSON schemas of the tools for the chat template, or None.
    """

    pair_id: str
    lang: str
    messages: list[dict[str, str]]
    gold: Answer
    answer_type: str = "number"
    choices: tuple[str, ...] = ()
    tools: list[dict[str, Any]] | None = None


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """Read the examples in a JSON Lines or Parquet file of canonical records. The written-out answer may be absent.

    Args:
        path: the file.
        limit: keep only the first `limit` example groups.

    Raises:
        UserError: the file is missing or empty, a record is malformed, or a language code is spelled in two ways; the
            message names the file, and the row of a malformed record.
    """
    examples: dict[tuple[str, str], Example] = {}

    def add(raw: Any) -> None:
        example = _parse_example(raw)
        if (example.pair_id, example.lang) in examples:
            raise UserError(f"pair_id {example.pair_id!r} has two records in language {example.lang!r}; keep one")
        examples[example.pair_id, example.lang] = example

    for row in read_inputs([path]):
        row.apply(add)
    if not examples:
        raise UserError(f"{path}: no records; nothing to evaluate")
    if error := spelling_error(lang for _, lang in examples):
        raise UserError(f"{path}: {error}")
    kept = set(list(dict.fromkeys(pair_id for pair_id, _ in examples))[:limit])
    return [example for example in examples.values() if example.pair_id in kept]


def _parse_example(raw: Any) -> Example:
    record = parse_record(_with_placeholder_response(raw) if isinstance(raw, dict) else raw)
    if len(record.messages) < 2:
        raise UserError("no message before the response; evaluation needs a question")
    gold, answer_type, choices = parse_gold(raw.get("gold"), raw.get("answer_type"), raw.get("choices"))
    return Example(record.pair_id, record.lang, record.messages[:-1], gold, answer_type, choices, record.tools)


def _with_placeholder_response(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace the response with a placeholder, because `parse_record` requires one and test data may lack it.

    Leave out what `parse_gold` checks.
    """
    raw = {key: value for key, value in raw.items() if key not in ("answer_type", "choices")}
    messages = raw.get("messages")
    if not isinstance(messages, list):
        return {**raw, "answer": "-"}
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return {**raw, "messages": [*messages, {"role": "assistant", "content": "-"}]}

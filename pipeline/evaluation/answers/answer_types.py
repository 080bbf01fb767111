"""The types of answers. Each is a module that parses gold answers, finds answers in responses, and compares them."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Protocol

from pipeline.common.errors import UserError
from pipeline.evaluation.answers import choice, expression, number, text
from pipeline.evaluation.answers.candidates import Answer, Reading

AUTO = "auto"


class AnswerType(Protocol):
    """What the module of an answer type provides."""

    NAME: str
    EXPECTED: str  # what a gold answer of this type is, for messages

    def parse_gold(self, gold: object, choices: Sequence[str] = ()) -> Any:
        """Return a gold answer in canonical form, or None if it is not of this type."""

    def extract(self, text: str, lang: str, finished: bool, choices: Sequence[str] = ()) -> Reading:
        """Return the answer in a response, in canonical form."""

    def equal(self, first: Any, second: Any) -> bool:
        """Return whether two answers in canonical form are equal. None equals nothing, not even None."""


TYPES: dict[str, AnswerType] = {module.NAME: module for module in (number, expression, choice, text)}


def parse_gold(gold: object, answer_type: object = None, choices: object = None) -> tuple[Answer, str, tuple[str, ...]]:
    """Return the canonical gold answer of a record, its type, and its options.

    The type "auto", or none, means: choice if there are options, number if the gold answer is one, expression if it has
    LaTeX or is a formula, or else text.

    Raises:
        UserError: the type is unknown, the options are malformed, or the gold answer is missing, ambiguous or of
            another type.
    """
    if answer_type not in (None, AUTO, *TYPES):
        names = ", ".join([*TYPES, AUTO])
        raise UserError(f"`answer_type` is {str(answer_type)[:40]!a}; it must be one of {names}")
    if gold is None or gold == "" or (isinstance(gold, float | Decimal) and math.isnan(gold)):
        raise UserError("`gold` is missing; set it to the final answer, for instance 42")
    options = _parse_choices(choices)
    name = _guess_type(gold, options) if answer_type in (None, AUTO) else str(answer_type)
    if name == "choice" and not options:
        raise UserError("`choices` is missing; set it to the list of the options' texts, or give another `answer_type`")
    value = TYPES[name].parse_gold(gold, options)
    if value is None:
        raise UserError(f"`gold` is {str(gold)[:60]!a}, which is not {TYPES[name].EXPECTED} (`answer_type` {name})")
    return value, name, options


def answers_equal(first: Answer | None, second: Answer | None, answer_type: str = "number") -> bool:
    """Return whether two answers of one type are equal. None equals nothing, not even None."""
    return TYPES[answer_type].equal(first, second)


def answers_agree(first: tuple[Answer | None, bool, str], second: tuple[Answer | None, bool, str]) -> bool:
    """Return whether the answers to a question in two languages are the same. None agrees with nothing.

    Each argument is an answer or None, whether it is correct, and its type. Two correct texts agree, since they are
    translations of each other.
    """
    (answer, correct, answer_type), (other, other_correct, other_type) = first, second
    if answer_type != other_type:
        return False
    return answers_equal(answer, other, answer_type) or (answer_type == text.NAME and correct and other_correct)


def answer_from_text(answer: str | None, answer_type: str = "number") -> Answer | None:
    """Return the canonical answer that was written as text, as in `generations.jsonl`."""
    return Decimal(answer) if answer is not None and answer_type == "number" else answer


def _parse_choices(choices: object) -> tuple[str, ...]:
    if choices is None:
        return ()
    if not isinstance(choices, list) or not all(isinstance(option, str) and option.strip() for option in choices):
        raise UserError("`choices` is not a list of texts")
    if not 2 <= len(choices) <= 10:
        raise UserError(f"`choices` has {len(choices)} options; there must be 2 to 10, A to J")
    return tuple(choices)


def _guess_type(gold: object, options: Sequence[str]) -> str:
    if options:
        return "choice"
    if number.parse_gold(gold) is not None:
        return "number"
    if re.fullmatch(r"[-+]?\d+,\d+", str(gold).strip()):
        raise UserError(f"`gold` is {str(gold)[:40]!a}, a decimal or two numbers; write 1.5, or 1, 5 with a space")
    return "expression" if expression.looks_like_expression(str(gold)) else "text"

r"""Answers that are numbers.

Numbers follow the conventions of the language: 70.000 is seventy thousand in German and seventy in English. They are
exact decimals of any length; only fractions such as 1/3 are rounded, to 28 significant digits.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, DecimalException

from pipeline.evaluation.answers.candidates import ABBREVIATION, MARKUP, NOTHING, Candidate, Reading, find_candidates
from pipeline.evaluation.answers.language_rules import rules_for
from pipeline.evaluation.answers.number_parsing import POWER, find_numbers, normalise
from pipeline.evaluation.answers.number_rules import NumberRules
from pipeline.evaluation.answers.plain_maths import superscripts_to_latex

NAME = "number"
EXPECTED = "a number, for instance 42"
TOLERANCE = Decimal("0.000001")
BEFORE_FIRST = rf"{MARKUP}(?:{ABBREVIATION}{MARKUP})?"
OPERATOR = re.compile(
    rf"[-–+*/×÷·⋅{POWER}]|\\(?:times|cdot|div)|(?<![^\W\d_])[xX]\s*[$€£¥₹]?\s*\d|%.*\d|\d.*%"  # 60% of 200 = 120
)
MAX_EXPONENT = 10_000  # a gold beyond 10^10000 is not a number that anybody answers


def parse_gold(gold: object, choices: Sequence[str] = ()) -> Decimal | None:
    """Parse a gold answer in English notation ("2,125", 8.0).

    Returns:
        None if it is not a finite number, or its decimal exponent is beyond -10000 or 10000.
    """
    if isinstance(gold, bool) or not isinstance(gold, int | float | str | Decimal):
        return None
    if re.search(r"[\^_]", superscripts_to_latex(str(gold))):  # 2^10 and 10² are formulas
        return None
    text = normalise(str(gold), NumberRules()).strip()
    if isinstance(gold, str) and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    try:
        value = Decimal(text)
    except DecimalException:
        return None
    return value if value.is_finite() and abs(value.adjusted()) <= MAX_EXPONENT else None


def extract(text: str, lang: str, finished: bool = True, choices: Sequence[str] = ()) -> Reading:
    r"""Return the final number of a response: that of the best candidate that has one, or else the last number.

    Args:
        text: the response.
        lang: code of its language.
        finished: whether the model ended the response itself. If it was cut at the token limit, its last number is an
            intermediate result or a part of a number. Then only a balanced `\boxed{}` or an answer phrase whose
            sentence is complete counts.
        choices: not used.
    """
    rules = rules_for(lang)
    text = normalise(text, rules.numbers)
    for candidate in find_candidates(text, rules, finished):
        answer = answer_in_span(candidate, rules.numbers)
        if answer is not None:
            return Reading(answer, candidate.read_by)
    numbers = find_numbers(text, rules.numbers) if finished else []
    return Reading(numbers[-1].value, "end") if numbers else NOTHING


def extract_answer(text: str, lang: str, finished: bool = True) -> Decimal | None:
    """Return the final number of a response as `extract` does, or None if there is none."""
    answer = extract(text, lang, finished).answer
    return answer if isinstance(answer, Decimal) else None


def equal(first: Decimal | None, second: Decimal | None) -> bool:
    """Return whether two answers are the same number. None equals nothing, not even None.

    Decimals are compared exactly. If they are written with different numbers of decimal places, they are also equal if
    one is the other rounded or truncated and they differ by at most 1e-6: 1/3 has no exact decimal form.
    """
    if first is None or second is None:
        return False
    difference = abs(first - second)
    places = [-int(value.as_tuple().exponent) for value in (first, second)]
    is_rounded = places[0] != places[1] and difference < Decimal(1).scaleb(-min(places))
    return difference == 0 or (is_rounded and difference <= TOLERANCE)


def answer_in_span(candidate: Candidate, rules: NumberRules) -> Decimal | None:
    """Return the number (or the result of the equation) at the start of the span, or else its last number.

    A number that is neither at the start nor the last of the response is no answer if a solution may have begun: after
    a heading ("Answer: Tom has 3 apples. He buys 4."), or among others without a result ("the sum of 3 and 4").
    """
    span = candidate.span
    numbers = find_numbers(span, rules)
    if not numbers:
        return None
    first = numbers[0]
    if not re.fullmatch(BEFORE_FIRST, span[: first.start]):
        is_result = len(numbers) == 1 or "=" in span
        return numbers[-1].value if candidate.is_last or (is_result and not candidate.is_heading) else None
    between = span[first.end : max(first.end, span.rfind("="))]
    is_equation = OPERATOR.search(between) and not re.search(r"[(][^)]*$", between)
    after = [number for number in numbers if number.start > first.end + len(between)]
    return after[0].value if is_equation and after else first.value

"""Answers of every type: hand-written responses, gold answers, and the type that a record does not name."""

from decimal import Decimal

import pytest

from pipeline.common.errors import UserError
from pipeline.evaluation.answers.answer_types import TYPES, answers_agree, parse_gold
from pipeline.evaluation.answers.candidates import Reading
from pipeline.evaluation.answers.language_rules import base_language
from tests.pipeline.evaluation.answer_cases import CASES
from tests.pipeline.evaluation.answers import more_typed_cases
from tests.pipeline.evaluation.answers.more_number_cases import CASES as MORE_CASES
from tests.pipeline.evaluation.answers.typed_cases import CAPITALS, CHOICES, EXPRESSIONS, TEXTS


def is_right(answer_type, lang, text, gold):
    value, _, _ = parse_gold(gold, answer_type)
    return TYPES[answer_type].equal(TYPES[answer_type].extract(text, lang, True).answer, value)


@pytest.mark.parametrize(("lang", "text", "gold", "right"), [*EXPRESSIONS, *more_typed_cases.EXPRESSIONS])
def test_expression_of_hand_written_response(lang, text, gold, right):
    assert is_right("expression", lang, text, gold) == right


@pytest.mark.parametrize(("lang", "choices", "text", "letter"), [*CHOICES, *more_typed_cases.CHOICES])
def test_choice_of_hand_written_response(lang, choices, text, letter):
    assert TYPES["choice"].extract(text, lang, True, choices).answer == letter


@pytest.mark.parametrize(("lang", "text", "gold", "right"), TEXTS)
def test_text_of_hand_written_response(lang, text, gold, right):
    assert is_right("text", lang, text, gold) == right


def test_cases_cover_languages_and_types():
    numbers = [(lang, text) for table in (CASES, MORE_CASES) for lang, cases in table.items() for text, _ in cases]
    typed = [(case[0], case) for table in (EXPRESSIONS, CHOICES, TEXTS) for case in table]
    assert len(numbers) + len(typed) >= 500
    assert len({base_language(lang) for lang, _ in [*numbers, *typed]}) >= 50
    for table in (EXPRESSIONS, CHOICES, TEXTS):
        assert len({case[0] for case in table}) >= 21


@pytest.mark.parametrize(
    ("text", "answer_type", "expected"),
    [
        (r"So $\boxed{\frac{1}{2}}$, and then", "expression", Reading(r"\frac{1}{2}", "box")),
        ("The answer is $x", "expression", Reading(None, "none")),
        ("We know $x = 3$ and", "expression", Reading(None, "none")),
        ("The answer is B. Because", "choice", Reading("B", "phrase")),
        ("The answer is B", "choice", Reading(None, "none")),
        ("Nairobi is the", "choice", Reading(None, "none")),
        ("#### Kampala\nNext", "text", Reading("Kampala", "####")),
        ("The capital is Kam", "text", Reading(None, "none")),
    ],
)
def test_cut_response_needs_complete_marker(text, answer_type, expected):
    assert TYPES[answer_type].extract(text, "en", False, CAPITALS) == expected


@pytest.mark.parametrize(
    ("gold", "answer_type", "choices", "value", "name"),
    [
        ("2,000", None, None, Decimal(2000), "number"),
        (8.0, "auto", None, Decimal(8), "number"),
        ("1/2", None, None, "1/2", "expression"),
        ("10^{20}", None, None, "10^{20}", "expression"),
        ("$(1, 2)$", None, None, "(1, 2)", "expression"),
        ("2√3", None, None, r"2\sqrt{3}", "expression"),
        ("10²", None, None, "10^{2}", "expression"),
        ("∞", None, None, r"\infty", "expression"),
        ("1, 5", None, None, "1, 5", "expression"),
        ("1,5", "expression", None, "1,5", "expression"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", None, None, r"\begin{pmatrix}1\\2\end{pmatrix}", "expression"),
        ("42", "expression", None, "42", "expression"),
        ("Nairobi", None, None, "Nairobi", "text"),
        ("2024-05-01", None, None, "2024-05-01", "text"),
        ("12:30", None, None, "12:30", "text"),
        ("42", "text", None, "42", "text"),
        ("B", None, ["x", "y"], "B", "choice"),
        ("Kampala", None, list(CAPITALS), "B", "choice"),
        ("1964", None, ["1963", "1964"], "B", "choice"),  # a number, but there are options
        ("B", "choice", ["A", "B"], "B", "choice"),
    ],
)
def test_parse_gold_of_any_type(gold, answer_type, choices, value, name):
    assert parse_gold(gold, answer_type, choices)[:2] == (value, name)


@pytest.mark.parametrize(
    ("gold", "answer_type", "choices", "message"),
    [
        ("eight", "number", None, "`gold` is 'eight', which is not a number"),
        (r"\frac{", "expression", None, "which is not a mathematical expression"),
        ("on Tuesday", "expression", None, "which is not a mathematical expression"),
        (r"\begin{array}{c}on Tuesday\end{array}", None, None, "which is not a mathematical expression"),
        ("C", "choice", ["x", "y"], "`gold` is 'C', which is not the letter of one of the `choices`"),
        (1, None, ["x", "y"], "`gold` is '1', which is not the letter"),
        ("A", "choice", None, "`choices` is missing"),
        ("A", "choice", ["x"], "`choices` has 1 options; there must be 2 to 10"),
        ("A", "choice", "xy", "`choices` is not a list"),
        ("A", "choice", ["B", "A"], "`gold` 'A' names two of the `choices`"),
        ("…", "text", None, "which is not a short text"),
        (None, None, None, "`gold` is missing"),
        (float("nan"), None, None, "`gold` is missing"),
        (Decimal("nan"), "text", None, "`gold` is missing"),
        ("1,5", None, None, "`gold` is '1,5', a decimal or two numbers"),
        ("-12,50", "auto", None, "`gold` is '-12,50', a decimal or two numbers"),
        ("1", "integer", None, "`answer_type` is 'integer'; it must be one of number, expression, choice, text, auto"),
    ],
)
def test_parse_gold_refuses_what_is_not_of_the_type(gold, answer_type, choices, message):
    with pytest.raises(UserError) as caught:
        parse_gold(gold, answer_type, choices)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_answers_agree_across_languages():
    assert answers_agree((r"\frac{1}{2}", False, "expression"), ("0.5", False, "expression"))
    assert not answers_agree((r"\frac{1}{2}", False, "expression"), ("0.4", False, "expression"))
    assert answers_agree(("B", False, "choice"), ("B", False, "choice"))
    assert answers_agree(("Nile", True, "text"), ("Nil", True, "text"))  # both are the gold answer of their language
    assert not answers_agree(("Nile", False, "text"), ("Nil", False, "text"))
    assert not answers_agree((None, False, "choice"), (None, False, "choice"))
    assert not answers_agree(("5", True, "text"), (Decimal(5), True, "number"))

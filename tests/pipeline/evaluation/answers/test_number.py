"""Numeric answers: hand-written solutions in more than 50 languages, random integers, degenerate text."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.answers.language_rules import ANSWER_LANGUAGES
from pipeline.evaluation.answers.number import equal, extract_answer, parse_gold
from pipeline.evaluation.answers.number_parsing import fold
from pipeline.evaluation.answers.phrases import HAND_WRITTEN
from tests.pipeline.evaluation.answer_cases import CASES, MINUS
from tests.pipeline.evaluation.answers.more_number_cases import CASES as MORE_CASES

TABLE = [(lang, text, answer) for lang, cases in CASES.items() for text, answer in cases]


@pytest.mark.parametrize(("lang", "text", "answer"), TABLE)
def test_extract_answer_hand_written_solution(lang, text, answer):
    expected = None if answer is None else Decimal(answer)
    assert extract_answer(text, lang) == expected


MORE = [(lang, text, answer) for lang, cases in MORE_CASES.items() for text, answer in cases]


@pytest.mark.parametrize(("lang", "text", "answer"), MORE)
def test_extract_answer_of_further_languages(lang, text, answer):
    assert extract_answer(text, lang) == (None if answer is None else Decimal(answer))


def test_cases_cover_every_language():
    assert set(CASES) == set(ANSWER_LANGUAGES) == set(HAND_WRITTEN)
    assert len(TABLE) >= 150


@pytest.mark.parametrize("lang", ANSWER_LANGUAGES)
def test_extract_answer_prefers_box_then_phrase_then_last_number(lang):
    phrase = {"en": "The answer is 5", "ja": "答えは5です", "zh": "答案是5", "th": "คำตอบคือ 5", "bn": "উত্তর হল 5"}
    text = phrase.get(lang, "#### 5")
    assert extract_answer(f"1 + 4. {text}\n6 7", lang) == 5
    assert extract_answer(rf"\boxed{{9}} {text}" + "\n6 7", lang) == 9
    assert extract_answer("1 + 4\n6 7", lang) == 7


@given(number=st.integers(-(10**9), 10**9), lang=st.sampled_from(ANSWER_LANGUAGES))
def test_extract_answer_any_integer_in_native_digits(number, lang):
    zeros = {"bn": "০", "te": "౦", "th": "๐", "ja": "０", "zh": "０"}
    written = "".join(chr(ord(zeros.get(lang, "0")) + int(c)) if c.isdigit() else MINUS for c in str(number))
    assert extract_answer(f"#### {written}", lang) == number
    assert extract_answer(f"5 = {written}", lang) == number


@given(text=st.text(max_size=80), lang=st.sampled_from(ANSWER_LANGUAGES))
def test_extract_answer_any_text_is_finite_or_none(text, lang):
    answer = extract_answer(text, lang)
    assert answer is None or answer.is_finite()
    if not any(c.isnumeric() for c in text):
        assert answer is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1" * 20000, Decimal("1" * 20000)),
        ("5 - " * 5000, Decimal(5)),
        (r"\boxed{" * 5000, None),
        ("answer " * 3000, None),
        ("1,234" * 4000, Decimal(234)),  # 1,2341,2341,...: not groups of thousands, so the last digits
    ],
)
def test_extract_answer_degenerate_text(text, answer):
    assert extract_answer(text, "en") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 + 4 = 7 apples, then buys 25", None),  # the last number is no answer
        ("The answer is 1", None),  # perhaps of 18
        ("The answer is 12.", None),  # perhaps of 12.5
        ("The answer is 18 - 10", None),
        ("The answer is 8. Next question: Tom has 9", "8"),
        ("#### 8\n\nQuestion: 5 + 6", "8"),
        (r"So \boxed{7} apples, and 9", "7"),
        (r"So \boxed{7", None),
        ("The answer is 8. Wait, the answer is 1", "8"),
    ],
)
def test_extract_answer_of_cut_solution_needs_marker(text, answer):
    assert extract_answer(text, "en", finished=False) == (None if answer is None else Decimal(answer))


@pytest.mark.parametrize("lang", ["zh-CN", "zh_Hant_TW", "ZH-cn"])
def test_extract_answer_region_uses_base_language(lang):
    assert extract_answer("答案是3万5000个", lang) == 35000
    assert extract_answer("Antwort: 70.000", "de-AT") == 70000 != extract_answer("Answer: 70.000", "en-US")


@pytest.mark.parametrize("number", ["12345678901234567", "-" + "7" * 40, "0.1234567890123456789012345678901234567"])
def test_extract_answer_long_number_is_exact(number):
    assert str(extract_answer(f"The answer is {number}.", "en")) == number
    assert str(parse_gold(number)) == number
    assert extract_answer("12345678901234567890123456789万1", "zh") == 123456789012345678901234567890001


def test_equal_compares_decimals_exactly():
    assert equal(Decimal("1.50"), Decimal("1.5"))
    assert not equal(Decimal("12345678901234567"), Decimal("12345678901234568"))
    assert not equal(Decimal("1.2345678901234567"), Decimal("1.2345678901234568"))
    assert not equal(Decimal("0.0000001"), Decimal("0.0000002"))
    assert equal(Decimal("0.30000000000000004"), Decimal("0.3"))  # a gold that was computed in floats
    assert not equal(Decimal(1) / 3, Decimal("0.3333335"))


def test_equal_to_six_decimals():
    assert equal(Decimal("8"), Decimal("8.0"))
    assert equal(Decimal(1) / 3, Decimal("0.3333333"))
    assert not equal(Decimal("0.33"), Decimal(1) / 3)
    assert not equal(Decimal("100000"), Decimal("100001"))
    assert not equal(Decimal("5"), Decimal("-5"))
    assert not equal(None, None)
    assert not equal(Decimal(0), None)


@pytest.mark.parametrize(
    ("gold", "value"),
    [
        (8, "8"),
        (8.0, "8"),
        ("2,125", "2125"),
        ("1,234.5", "1234.5"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("৮", "8"),
        (0.1, "0.1"),
        ("1e6", "1000000"),
        (Decimal("4567891234567.12345"), "4567891234567.12345"),
    ],
)
def test_parse_gold_english_notation(gold, value):
    assert parse_gold(gold) == Decimal(value)


@pytest.mark.parametrize(
    "gold", ["", "eight", "1,2", "2^10", "1/2", None, True, [8], float("nan"), "inf", "1e999999999"]
)
def test_parse_gold_not_a_number_is_none(gold):
    assert parse_gold(gold) is None


@pytest.mark.parametrize("symbol", ["㏠", "㋀", "㍘", "㎡"])
def test_extract_answer_of_a_symbol_that_is_no_number(symbol):
    assert extract_answer(f"答案是8。见{symbol}", "zh") == 8
    assert extract_answer(symbol, "zh") is None


@pytest.mark.parametrize(
    ("numeral", "value"),
    [
        ("፱", 9),
        ("፲፩", 11),
        ("፻", 100),
        ("፻፳፫", 123),
        ("፲፻", 1000),
        ("፲፱፻፺፱", 1999),
        ("፼", 10_000),
        ("፼፻", 10_100),
        ("፲፪፼፴፬፻፶፮", 123_456),
        ("፻፼", 1_000_000),
        ("፼፼", 100_000_000),
    ],
)
def test_fold_reads_ethiopic_numeral(numeral, value):
    assert fold(f"{numeral} ብር").split() == [str(value), "ብር"]

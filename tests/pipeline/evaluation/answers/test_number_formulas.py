"""Numbers in formulas, under headings, after abbreviations, and in American notation within a decimal comma."""

from decimal import Decimal

import pytest

from pipeline.evaluation.answers.candidates import find_candidates
from pipeline.evaluation.answers.language_rules import rules_for
from pipeline.evaluation.answers.number import extract_answer, parse_gold


def value(text, lang, finished=True):
    answer = extract_answer(text, lang, finished)
    return None if answer is None else float(answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5 x $3 = $15", 15),
        ("The answer is 60% of 200 = 120. It took 3 days.", 120),
        ("The answer is $200 at 60% = $120", 120),
        ("The answer is 50% = 0.5", 50),
        (r"\boxed{5 \times 3 = 15}", 15),
        (r"\boxed{3 \cdot 5 = 15}", 15),
        ("**Answer:** 3 · 5 = 15 apples in 4 days", 15),
        (r"\boxed{30 \div 2 = 15}", 15),
        (r"\boxed{(-2)^2 = 4}", 4),
        (r"\boxed{x = 5}", 5),
    ],
)
def test_extract_answer_equation_with_any_operator(text, answer):
    assert value(text, "en") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2^{10} = 1024}", 1024),
        (r"\boxed{2^{10}}", 1024),
        (r"\boxed{10^3}", 1000),
        (r"\boxed{10^{-3}}", 0.001),
        (r"\boxed{-2^2}", -4),
        (r"\boxed{2.5 \times 10^{3}}", 2500),
        ("The answer is 3 x 10^8 m/s.", 3e8),
        ("The answer is 10³. It took 2 days.", 1000),
        ("The answer is 2.5·10⁻³.", 0.0025),
        (r"\boxed{2^3/5}", 1.6),
        ("The answer is 3.5e4.", 35000),
        ("The answer is $1e6. It took 2 days.", 1e6),
        (r"\boxed{-1.5E-3}", -0.0015),
        (r"\boxed{2E+03}", 2000),
        (r"\boxed{1e99999}", None),
        ("The answer is 7, by the formula 3e and code A12E5.", 7),
        (r"\boxed{\frac{1}{2^{3}}}", 0.125),
        (r"\boxed{\frac12}", 0.5),
        (r"\boxed{2\frac12}", 2.5),
        (r"\boxed{\frac{1}4}", 0.25),
        (r"\boxed{5 m^2}", 5),
        (r"\boxed{90^{\circ}}", 90),
        (r"\boxed{10^{999999999}}", None),
        (r"\boxed{2.5 \times 10^{999999999}}", None),
        (r"\boxed{10^{" + "9" * 5000 + "}}", None),
        (r"\boxed{12345^{9999}}", None),
        (r"\boxed{0^{-1}}", None),
    ],
)
def test_extract_answer_power_and_fraction(text, answer):
    assert value(text, "en") == answer


@pytest.mark.parametrize("gold", ["10²", "10⁻³", "3²"])
def test_parse_gold_superscript_is_none(gold):
    assert parse_gold(gold) is None


@pytest.mark.parametrize(
    ("lang", "text", "answer"),
    [
        ("en", "Answer: Tom has 3 apples and buys 4. So 3 + 4 = 7.", 7),
        ("en", "Step-by-Step Answer: Roger started with 5 balls. He bought 2 cans of 3. 5 + 6 = 11.", 11),
        ("en", "Answer:\nTom has 3 apples.\nHe buys 4.\nHe has 7.", 7),
        ("en", "The answer is the sum of 3 and 4. 3+4=7.", 7),
        ("sw", "Jibu: Tom ana tufaha 3 na ananunua 4. Kwa hiyo 3 + 4 = 7.", 7),
        ("es", "Respuesta: Tom tiene 3 manzanas y compra 4. Entonces 3 + 4 = 7.", 7),
        ("de", "Lösung: Tom hat 3 Äpfel und kauft 4. Also 3 + 4 = 7.", 7),
        ("ru", "Ответ: У Тома 3 яблока, он покупает 4. Значит, 3 + 4 = 7.", 7),
        ("hi", "उत्तर: टॉम के पास 3 सेब हैं और वह 4 खरीदता है। 3 + 4 = 7।", 7),
        ("zh", "解答：汤姆有3个苹果，又买了4个。所以3+4=7。", 7),
        ("ja", "解答：トムはりんごを3個持っていて、4個買います。3+4=7です。", 7),
        # What states an answer all the same:
        ("en", "The answer is that Tom has 8 apples. This took 3 days.", 8),
        ("en", "The answer is that Tom has 3 + 5 = 8 apples. This took 3 days.", 8),
        ("en", "Tom buys 5.\nAnswer: Tom has 8 apples.", 8),
        ("sw", "Jibu la mwisho ni watoto 12. Kadi 5 zimebaki.", 12),
    ],
)
def test_extract_answer_heading_of_solution_is_no_answer(lang, text, answer):
    assert value(text, lang) == answer


def test_extract_answer_heading_of_cut_solution_is_none():
    assert value("Answer: Tom has 3 apples and buys 4. So", "en", finished=False) is None
    assert value("The answer is that Tom has 8 apples. So", "en", finished=False) == 8


@pytest.mark.parametrize(
    ("lang", "text", "answer"),
    [
        ("en", "The answer is Rs. 500. This took him 3 days.", 500),
        ("en", "The answer is about Rs. 500. This took him 3 days.", 500),
        ("en", "The answer is approx. 500. This took him 3 days.", 500),
        ("sw", "Jibu ni Tsh. 500. Kwa sababu 3 + 4.", 500),
        ("de", "Die Antwort ist ca. 500. Es dauert 3 Tage.", 500),
        ("te", "సమాధానం: రూ. 500. మిగిలినవి 3.", 500),
        ("hi", "उत्तर: रु. 500 है। बाकी 3 हैं।", 500),
        ("en", "The answer is unclear. 3 people came. Later 4 left.", 4),
        ("en", "The answer is not so clear. 3 people came and 4 left. So 7.", 7),
    ],
)
def test_extract_answer_abbreviation_ends_no_sentence(lang, text, answer):
    assert value(text, lang) == answer


@pytest.mark.parametrize("lang", ["nb", "nn", "no"])
def test_extract_answer_norwegian_codes_share_phrases(lang):
    assert value("Svaret er 8. Det tok 3 dager.", lang) == 8


@pytest.mark.parametrize("lang", ["de", "es", "fr", "ru"])
def test_extract_answer_american_comma_in_european_language(lang):
    thousands = {"$70,000": 70000, "70,000": 70000, "2,000": 2000, "$2,375": 2375}
    decimals = {"2,375": "2.375", "0,125": "0.125", "0,000": 0, "70,0": 70}
    for text, answer in (thousands | decimals).items():
        assert extract_answer(f"#### {text}", lang) == Decimal(answer), text


def test_find_candidates_limits_length_of_spans():
    """Otherwise the time to read a response that repeats a phrase would grow with the square of its length."""
    candidates = find_candidates("The answer is 7 and " * 500, rules_for("en"), finished=True)
    assert 1 < len(candidates) < 100 and max(len(candidate.span) for candidate in candidates) == 1000  # equal ones once
    assert not candidates[-1].is_last and candidates[0].is_last

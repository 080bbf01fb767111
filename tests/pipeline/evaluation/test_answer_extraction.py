"""Answer extraction on hand-written solutions in eleven languages, known failures of other extractors among them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.evaluation.answer_extraction import LANGUAGES, PHRASES, answers_equal, extract_answer, parse_gold

NB, NARROW, THIN, MINUS = "\u00a0", "\u202f", "\u2009", "\u2212"

CASES = {
    "en": [
        ("The answer is 8.", "8"),
        ("The answer is 1.8.", "1.8"),
        ("the answer is: 1,234.5 kg", "1234.5"),
        ("So the answer is $70,000.", "70000"),
        ("The answer is 70.000", "70.000"),
        (f"The answer is 70{NARROW}000.", "70000"),
        (f"The answer is 1{NB}234{NB}567.5", "1234567.5"),
        ("The answer is -5.", "-5"),
        (f"The answer is {MINUS}5.", "-5"),
        ("The answer is –5 degrees.", "-5"),
        ("The answer is - 5.", "-5"),
        ("The answer is -$5.50.", "-5.50"),
        ("The answer is $-5.50.", "-5.50"),
        ("18 - 10 = 8", "8"),
        ("10-7 = -3", "-3"),
        ("He ran 5-10", "10"),
        ("We are left with 10 apples - 7", "7"),
        ("It was COVID-19", "19"),
        ("The answer is 18 - 10 = 8 apples.", "8"),
        ("The answer is 5 (since 10 - 5 = 5, and 2 + 2 = 4).", "5"),
        ("The answer is 5 out of 10.", "5"),
        ("Answer: 8", "8"),
        ("**Answer:** 8", "8"),
        ("Final Answer:\n\n**8**", "8"),
        ("Answer:\n- 8 apples", "8"),
        ("The final answer to the question is therefore 12 apples.", "12"),
        ("To find the answer, subtract 10 from 18. That leaves 8.", "8"),
        ("The answer is 3. Next question: Tom has 7 apples.", "3"),
        ("The answer is 3. Wait, no. The answer is 4.", "4"),
        ("The answer is unclear, but 12 fits.", "12"),
        ("Answer: Tom has 8 apples.", "8"),
        ("The answer is 42. The answer is unknown.", "42"),
        (r"The answer is 7. \boxed{8}", "8"),
        (r"\boxed{7} and then \boxed{8}. The answer is 9.", "8"),
        (r"$\boxed{18 - 10 = 8}$", "8"),
        (r"\boxed{x = -2.5}", "-2.5"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{-\dfrac{1}{2}}", "-0.5"),
        (r"\boxed{2\frac{1}{2}}", "2.5"),
        (r"\boxed{10{,}000}", "10000"),
        (r"\boxed{10\,000}", "10000"),
        (r"\boxed{\$70,000}", "70000"),
        (r"\boxed{25 \text{ m}^2}", "25"),
        (r"\boxed{\text{8 apples}}", "8"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{}. The answer is 3", "3"),
        (r"\boxed{12", "12"),
        (r"\boxed{5}, unbalanced \boxed{6", "5"),
        ("#### 1,200", "1200"),
        ("10 / 4 = 2.5\n#### 2.5", "2.5"),
        ("The area is 25 m².", "25"),
        ("The area is 25 ㎡.", "25"),
        ("There are 8¹ apples.", "8"),
        ("He drank 2½", "2.5"),
        ("She ate ¾", "0.75"),
        ("It takes 2 1/2", "2.5"),
        ("The answer is 3/4.", "0.75"),
        ("The answer is 3/0.", "3"),
        ("The answer is .5", "0.5"),
        ("The answer is 5 million.", "5000000"),
        ("The answer is 1,2,3", "3"),
        ("The answer is 1,00,000.", "100000"),
        ("１２ plus ２ is １４", "14"),
        ("The answer is 1,234,567.89.", "1234567.89"),
        ("The answer is 1.234.567,89.", "1234567.89"),
        ("x = 7, so x2 holds", "7"),
        ("The answer is 8\u200b.", "8"),
        ("The answer is 007.", "7"),
        ("_8_ apples and __9__", "9"),
        ("To answer that, note that there is 1 pig. In all 12.", "12"),
        ("2^3 = 8", "8"),
        ("1/" + "9" * 5000 + " and 4", "4"),
        ("3/4/2024", "2024"),
        ("No digits here.", None),
        ("", None),
        ("...", None),
        ("The answer is eight.", None),
    ],
    "de": [
        ("Die Antwort ist 8.", "8"),
        ("Die Antwort ist 70.000.", "70000"),
        ("Die Antwort ist 1,8.", "1.8"),
        ("Die Antwort ist 1.8.", "1.8"),
        ("Die Antwort lautet 1.234,56 €.", "1234.56"),
        ("Die Antwort lautet 1.234.567.", "1234567"),
        (f"Antwort: 70{NARROW}000 Euro", "70000"),
        ("Antwort: 70 000 Euro", "70000"),
        ("Die Antwort ist 70’000.", "70000"),
        ("Das Ergebnis beträgt -12,5 Grad.", "-12.5"),
        ("Die Antwort ist 2,125.", "2.125"),
        ("Die Antwort ist 0,125.", "0.125"),
        ("Die Antwort ist 0.125.", "0.125"),
        ("Die Antwort ist 2 Millionen.", "2000000"),
        ("Um die Frage zu beantworten, nimmt man 3. Es sind 4.", "4"),
        (r"Die Antwort ist 3. \boxed{1.500}", "1500"),
        ("Er hat 10 Äpfel und 12,50 €", "12.50"),
        ("Lösung: 5", "5"),
        ("The answer is 1.500", "1500"),
        ("Keine Zahl.", None),
    ],
    "fr": [
        ("La réponse est 8.", "8"),
        ("La re\u0301ponse est 8. Merci aux 3 amis.", "8"),
        (f"La réponse est 70{NARROW}000.", "70000"),
        (f"La réponse est 70{NB}000 $.", "70000"),
        ("La réponse est 70 000 €.", "70000"),
        ("La réponse est 1 234 567,5.", "1234567.5"),
        ("La réponse est 1,8.", "1.8"),
        ("La réponse est 64,625.", "64.625"),
        ("La réponse est 70.000.", "70000"),
        ("La réponse est 2.375", "2.375"),
        ("Réponse : 12", "12"),
        ("La réponse finale est donc −4.", "-4"),
        ("La réponse est 3 millions.", "3000000"),
        ("La réponse est 1/2.", "0.5"),
        ("Il en reste 12 300 5", "5"),
        ("Il reste 25 680 $ + 4 858 $ = 30 538 $", "30538"),
        ("Aucune idée.", None),
    ],
    "es": [
        ("La respuesta es 8.", "8"),
        ("La respuesta es 1,8.", "1.8"),
        ("La respuesta es 2,375.", "2.375"),
        ("La respuesta es $2,375.", "2375"),
        ("La respuesta es 22,800.", "22800"),
        ("La respuesta es 22.800.", "22800"),
        ("La respuesta es 22,222,468.", "22222468"),
        ("La respuesta es 1.234,5.", "1234.5"),
        ("La respuesta es 70 000.", "70000"),
        (f"La respuesta es {MINUS}19.578.", "-19578"),
        ("La respuesta final será: 12 años", "12"),
        ("La respuesta es 5 mil.", "5000"),
        ("La respuesta es 2 mil millones.", "2000000000"),
        ("Respuesta: 3,50 €", "3.50"),
        ("539,651 - 255,556 = 284,195", "284195"),
        ("Nada.", None),
    ],
    "ru": [
        ("Ответ: 8.", "8"),
        ("Ответ — 8.", "8"),
        ("Ответ – 8.", "8"),
        ("Ответ - 8.", "8"),
        ("Ответ: -8.", "-8"),
        ("Ответ: −8.", "-8"),
        ("Ответ –8.", "-8"),
        ("Ответ: 66,5.", "66.5"),
        ("Ответ: 66.5.", "66.5"),
        ("Ответ: 108 954.", "108954"),
        (f"Ответ: 108{NARROW}954,25.", "108954.25"),
        (f"Ответ: 1{THIN}234 детей", "1234"),
        ("Ответ равен 12 годам.", "12"),
        ("Ответ: 5 тысяч", "5000"),
        ("Ответ: 1,5 млн", "1500000"),
        ("Получаем 15–5 = 10 детей", "10"),
        ("всего 15 – 5", "5"),
        ("10 056–21 184", "21184"),
        ("ОТВЕТ: 4. Осталось 9.", "4"),
        ("нет числа", None),
    ],
    "sw": [
        ("Jibu ni 8.", "8"),
        ("Jibu ni 1.8.", "1.8"),
        ("Jibu ni 10,000.", "10000"),
        ("Jibu ni shilingi 500.", "500"),
        ("Jibu ni Ksh500.", "500"),
        ("Jibu ni elfu 70.", "70000"),
        ("Jibu ni milioni 2.", "2000000"),
        ("Jibu: -3", "-3"),
        ("Jibu la mwisho ni watoto 12. Kadi 5 zimebaki.", "12"),
        ("ana kadi 10 356", "356"),
        (f"Jibu ni 10{NARROW}356", "10356"),
        ("Hakuna.", None),
    ],
    "bn": [
        ("উত্তর হল ৮।", "8"),
        ("উত্তর হল 8।", "8"),
        ("উত্তর হল ১.৮।", "1.8"),
        ("উত্তর হল ১.", "1"),
        ("উত্তর হল ১২,৩৪৫।", "12345"),
        ("উত্তর হল ১,২৩,৪৫৬।", "123456"),
        ("উত্তর হল -৫।", "-5"),
        (f"উত্তর হল {MINUS}৫।", "-5"),
        ("উত্তর ৮।", "8"),
        ("উত্তর হলো ৮। বাকি ৩।", "8"),
        ("উত্তরটি ৮।", "8"),
        ("উত্তর: ৳৫০০", "500"),
        ("উত্তর হল ৮টি। আরও ৫টি আছে।", "8"),
        ("উত্তর হবে ৫ লক্ষ ২০ হাজার।", "520000"),
        ("মোট ১৮ - ১০ = ৮৷", "8"),
        (r"\boxed{১৮}", "18"),
        ("মোট ১৮ জন", "18"),
        ("কিছু নেই।", None),
    ],
    "te": [
        ("సమాధానం 8.", "8"),
        ("సమాధానం: ౧౮", "18"),
        ("సమాధానం ౧.౮.", "1.8"),
        ("జవాబు = 12,345", "12345"),
        ("సమాధానం: 1,00,000 రూపాయలు", "100000"),
        ("సమాధానం: ₹-౫", "-5"),
        ("సమాధానం ఏమిటంటే 7. మిగిలినవి 3.", "7"),
        ("సమాధానం: 3 లక్షలు", "300000"),
        ("మొత్తం ౧౦ - ౭ = ౩", "3"),
        (r"\boxed{౪౨}", "42"),
        ("ఏమీ లేదు", None),
    ],
    "th": [
        ("คำตอบคือ 8", "8"),
        ("คำตอบคือ ๘", "8"),
        ("คำตอบคือ ๑.๘.", "1.8"),
        ("คำตอบคือ ๑๒,๓๔๕", "12345"),
        ("คำตอบคือ 4,096.00", "4096"),
        ("คำตอบคือ -5", "-5"),
        ("คำตอบคือ−๕ องศา", "-5"),
        ("คำตอบ: 8 คน", "8"),
        ("คำตอบสุดท้ายคือ 8 คน และมีอีก 5 คน", "8"),
        ("คําตอบคือ 8 ไม่ใช่ 9", "8"),
        ("คำตอบคือ 2 ล้าน", "2000000"),
        ("คำตอบคือ ฿500", "500"),
        ("ดังนั้น 18 - 10 = 8 คน", "8"),
        ("ไม่มี", None),
    ],
    "ja": [
        ("答えは8です。", "8"),
        ("答えは 8 です。", "8"),
        ("答えは８です。", "8"),
        ("答えは、１．８です。", "1.8"),
        ("答えは１２，３４５円です。", "12345"),
        ("答えは-5です。", "-5"),
        ("答えは−５です。", "-5"),
        ("答え：8人。残りは3人。", "8"),
        ("答えを求めるには、18から10を引きます。8人です。", "8"),
        ("正解は12匹です", "12"),
        ("答えは3万5000円です。", "35000"),
        ("答えは1億2000万です。", "120000000"),
        ("答えは5千円です。", "5000"),
        ("答えは18 - 10 = 8です。", "8"),
        ("合計で¥70,000になります", "70000"),
        (r"したがって\boxed{8}人", "8"),
        ("わかりません。", None),
    ],
    "zh": [
        ("答案是8。", "8"),
        ("答案是 8。", "8"),
        ("答案是１．８。", "1.8"),
        ("答案为 12,345。", "12345"),
        ("答案是-5。", "-5"),
        ("答案是－５。", "-5"),
        ("答：8个苹果，剩3个。", "8"),
        ("最终答案：70000元", "70000"),
        ("答案是3万。", "30000"),
        ("答案是1.2亿。", "120000000"),
        ("答案是5千克。", "5"),
        ("答案是5千米。", "5"),
        ("所以周二和四个孩子玩，15 - 5 = 10。", "10"),
        ("答案是①。共 7 个", "7"),
        (r"答案是\boxed{\text{8个}}。", "8"),
        ("不知道。", None),
    ],
}
TABLE = [(lang, text, answer) for lang, cases in CASES.items() for text, answer in cases]


@pytest.mark.parametrize(("lang", "text", "answer"), TABLE)
def test_extract_answer(lang, text, answer):
    expected = None if answer is None else Decimal(answer)
    assert extract_answer(text, lang) == expected


def test_table_covers_every_language():
    assert set(CASES) == set(LANGUAGES) == set(PHRASES)
    assert len(TABLE) >= 150


@pytest.mark.parametrize("lang", LANGUAGES)
def test_box_wins_over_phrase_and_phrase_over_last_number(lang):
    phrase = {"en": "The answer is 5", "ja": "答えは5です", "zh": "答案是5", "th": "คำตอบคือ 5", "bn": "উত্তর হল 5"}
    text = phrase.get(lang, "#### 5")
    assert extract_answer(f"1 + 4. {text}\n6 7", lang) == 5
    assert extract_answer(rf"\boxed{{9}} {text}" + "\n6 7", lang) == 9
    assert extract_answer("1 + 4\n6 7", lang) == 7


def test_unknown_language_is_a_user_error():
    with pytest.raises(UserError, match="'xx'"):
        extract_answer("5", "xx")


@given(number=st.integers(-(10**9), 10**9), lang=st.sampled_from(LANGUAGES))
def test_any_integer_survives_each_languages_digits(number, lang):
    zeros = {"bn": "০", "te": "౦", "th": "๐", "ja": "０", "zh": "０"}
    written = "".join(chr(ord(zeros.get(lang, "0")) + int(c)) if c.isdigit() else MINUS for c in str(number))
    assert extract_answer(f"#### {written}", lang) == number
    assert extract_answer(f"5 = {written}", lang) == number


@given(text=st.text(max_size=80), lang=st.sampled_from(LANGUAGES))
def test_any_text_gives_a_finite_number_or_none(text, lang):
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
        ("1,234" * 4000, Decimal(234)),  # 1,2341,2341,...: no number with thousands, so the last digits
    ],
)
def test_degenerate_text_is_read_in_reasonable_time(text, answer):
    assert extract_answer(text, "en") == answer


def test_answers_equal():
    assert answers_equal(Decimal("8"), Decimal("8.0"))
    assert answers_equal(Decimal(1) / 3, Decimal("0.3333333"))
    assert not answers_equal(Decimal("0.33"), Decimal(1) / 3)
    assert not answers_equal(Decimal("100000"), Decimal("100001"))
    assert not answers_equal(Decimal("5"), Decimal("-5"))
    assert not answers_equal(None, None)
    assert not answers_equal(Decimal(0), None)


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
    ],
)
def test_parse_gold(gold, value):
    assert parse_gold(gold) == Decimal(value)


@pytest.mark.parametrize("gold", ["", "eight", "1,2", None, True, [8], float("nan"), "inf"])
def test_parse_gold_refuses_what_is_no_number(gold):
    assert parse_gold(gold) is None

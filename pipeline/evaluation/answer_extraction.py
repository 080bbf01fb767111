r"""Extract the final number from a written solution in one of eleven languages.

The last balanced `\boxed{}` takes precedence, then the last answer phrase of the language ("The answer is 8",
"答えは8です"), then the last number. Numbers follow the conventions of the language: 70.000 is seventy thousand in
German and seventy in English. They are exact decimals of any length; only fractions such as 1/3 are rounded, to 28
significant digits.
"""

import re
from collections.abc import Iterator
from decimal import Decimal, DecimalException

from pipeline.common.errors import UserError
from pipeline.evaluation.number_parsing import find_numbers, fold, normalise

# Answer phrases: a noun, and the copulas that may connect it to the number.
PHRASES = {
    "bn": (r"উত্তর(?:টি|টা)?", r"হলো|হল(?!ে)|হবে|হচ্ছে|হয়|হ'ল"),
    "de": (r"\b(?:Antwort|Lösung|Ergebnis)\b", r"\b(?:ist|lautet|beträgt|wäre)\b"),
    "en": (r"\banswers?\b", r"\b(?:is|are|was|equals|will be|would be)\b"),
    "es": (r"\b(?:respuesta|resultado)\b", r"\b(?:es|son|será|sería)\b"),
    "fr": (r"\b(?:r[ée]ponse|r[ée]sultat)\b", r"\b(?:est|sont|sera|serait|vaut)\b"),
    "ja": (r"答え|解答|回答|正解", r"は、?"),
    "ru": (r"\bответ(?:ом)?\b", r"\b(?:будет|равен|это|является|составляет|составит)\b"),
    "sw": (r"\b(?:jibu|majibu)\b", r"\b(?:ni|litakuwa|itakuwa)\b"),
    "te": (r"సమాధానం|జవాబు", r"ఏమిటంటే|అవుతుంది"),
    "th": (r"คำตอบ", r"คือ|เท่ากับ|เป็น"),
    "zh": (r"答案|答(?=[:是为])", r"是|就是|为|為|等于|等於"),
}
ANSWER_LANGUAGES = tuple(PHRASES)
TOLERANCE = Decimal("0.000001")
MAX_EXPONENT = 10_000  # a gold beyond 10^10000 is not a number that anybody answers
SENTENCE_END = re.compile(r"[\n。!?।॥৷]|\.(?!\d)")
MARKUP = r"[\s*_$\\(\[{~≈\"'“”«»`:,、]*"


def extract_answer(text: str, lang: str, finished: bool = True) -> Decimal | None:
    r"""Return the final numeric answer of a solution, or None if there is none.

    Args:
        text: the solution.
        lang: language of the solution; see `base_language`.
        finished: whether the model ended the solution itself. If it was cut at the token limit, its last number is an
            intermediate result or a part of a number. Then only a balanced `\boxed{}` or an answer phrase whose
            sentence is complete counts.

    Raises:
        UserError: the language is not in `ANSWER_LANGUAGES`.
    """
    base = base_language(lang)
    if base is None:
        raise UserError(f"no answer extraction for language {lang!r}; known: {', '.join(ANSWER_LANGUAGES)}")
    text = normalise(text)
    candidates = [*reversed(list(_boxes(text))), *_phrase_spans(text, base, finished)]
    for span in candidates:
        answer = _answer_in_span(span, base)
        if answer is not None:
            return answer
    numbers = find_numbers(text, base) if finished else []
    return numbers[-1].value if numbers else None


def base_language(lang: str) -> str | None:
    """Return the entry of `ANSWER_LANGUAGES` that a code with region or script belongs to, such as zh for zh_Hans-CN.

    Upper and lower case are equal. None if answers in that language cannot be extracted.
    """
    base = re.split("[-_]", lang, maxsplit=1)[0].lower()
    return base if base in PHRASES else None


def answers_equal(first: Decimal | None, second: Decimal | None) -> bool:
    """Return whether two answers are the same number. None equals no answer.

    Decimals are compared exactly. If they are written with different numbers of decimal places, they are also equal if
    one is the other rounded or truncated and they differ by at most 1e-6: 1/3 has no exact decimal form.
    """
    if first is None or second is None:
        return False
    difference = abs(first - second)
    places = [-int(value.as_tuple().exponent) for value in (first, second)]
    is_rounded = places[0] != places[1] and difference < Decimal(1).scaleb(-min(places))
    return difference == 0 or (is_rounded and difference <= TOLERANCE)


def parse_gold(gold: object) -> Decimal | None:
    """Parse a gold answer in English notation ("2,125", 8.0). Return None if it is not a finite number."""
    if isinstance(gold, bool) or not isinstance(gold, int | float | str | Decimal):
        return None
    text = normalise(str(gold)).strip()
    if isinstance(gold, str) and re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    try:
        value = Decimal(text)
    except DecimalException:
        return None
    return value if value.is_finite() and abs(value.adjusted()) <= MAX_EXPONENT else None


def _boxes(text: str) -> Iterator[str]:
    r"""Yield the content of each balanced \boxed{}, in the order of their closing braces."""
    opened: list[tuple[bool, int]] = []  # whether it is a box, and the index at which its content starts
    for brace in re.finditer(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]", text):
        if brace[0] in (r"\{", r"\}"):
            continue
        if brace[0] != "}":
            opened.append((len(brace[0]) > 1, brace.end()))
        elif opened:
            is_box, start = opened.pop()
            if is_box:
                yield text[start : brace.start()].strip()


def _phrase_spans(text: str, lang: str, finished: bool) -> Iterator[str]:
    """Yield the text after each answer phrase up to the end of its sentence, the last phrase first.

    If the text is not `finished`, omit a sentence without an end. A full stop at the very end may be a decimal point.
    """
    for match in reversed(list(_phrase_pattern(lang).finditer(text))):
        rest = text[match.end() :].lstrip(" *_:")
        if rest.startswith("\n"):
            rest = rest.lstrip("\n *_:").removeprefix("- ")  # on a new line "- 8" is a list item
        end = SENTENCE_END.search(rest)
        if finished or (end and (end[0] != "." or end.end() < len(rest))):
            yield rest[: end.start()] if end else rest


def _phrase_pattern(lang: str) -> re.Pattern[str]:
    """Compile the answer phrases of the language, the English ones that models mix in, and GSM8K's ####."""
    joined = []
    for noun, copula in {PHRASES[lang], PHRASES["en"]}:
        noun, copula = fold(noun), fold(copula)
        gap = r"[^\n.,:=。!?।\dをに]{0,40}?"  # "to answer that, …" and 答えを求めるには state no answer
        # A spaced dash after the noun is a copula ("Ответ - 8"); a noun without copula counts only next to a number.
        joined.append(rf"(?:{noun})(?:{gap}(?:{copula})|\W{{0,3}}[:=]|\s*[-–—](?=\s)|(?=[\s*$]*-?\d))")
    return re.compile("|".join([*joined, "####"]), re.IGNORECASE)


def _answer_in_span(span: str, lang: str) -> Decimal | None:
    """Return the number (or the result of the equation) at the start of the span, or else its last number."""
    numbers = find_numbers(span, lang)
    if not numbers:
        return None
    first = numbers[0]
    if not re.fullmatch(MARKUP, span[: first.start]):
        return numbers[-1].value
    between = span[first.end : max(first.end, span.rfind("="))]
    is_equation = re.search(r"[-–+*/×÷]", between) and not re.search(r"[(][^)]*$", between)
    after = [number for number in numbers if number.start > first.end + len(between)]
    return after[0].value if is_equation and after else first.value

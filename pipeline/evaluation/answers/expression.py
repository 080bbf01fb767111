r"""Answers that are mathematical expressions: fractions, radicals, intervals, sets, tuples, polynomials.

An expression is LaTeX, or plain notation such as 3/4 or (1, 2). math-verify decides whether two are equal: \frac{1}{2}
equals 0.5, x = 5 equals 5, and {2, 1} equals {1, 2}.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache

from pipeline.evaluation.answers import number
from pipeline.evaluation.answers.candidates import NOTHING, Candidate, Reading, find_candidates
from pipeline.evaluation.answers.expression_worker import Comparer
from pipeline.evaluation.answers.language_rules import LanguageRules, rules_for
from pipeline.evaluation.answers.number_parsing import ETHIOPIC_NUMERAL, ethiopic_value, find_numbers, fold, normalise
from pipeline.evaluation.answers.number_rules import NumberRules
from pipeline.evaluation.answers.phrases import NEVER
from pipeline.evaluation.answers.plain_maths import NAMES, SUPERSCRIPTS, to_latex
from pipeline.evaluation.answers.text import TEXT_COMMAND, without_copula

NAME = "expression"
EXPECTED = r"a mathematical expression, for instance \frac{1}{2} or (1, 2)"
MAX_LENGTH = 400  # characters; longer texts are no answer, and slow to parse
BEFORE_EXPRESSION = r"[\s*]*(?:\$|\\[(\[]|[-+]?\d)"
FORMULA = r"(.{1,2000}?)"  # bounded, since a response may repeat an opening delimiter without end
SINGLE = rf"(?<!\\)\${FORMULA}(?<!\\)\$"
MATHS = re.compile(rf"\$\${FORMULA}\$\$|{SINGLE}|\\\({FORMULA}\\\)|\\\[{FORMULA}\\\]", re.DOTALL)
COMMAND = re.compile(r"\\[A-Za-z]+|[\^_{}]")
FUNCTIONS = (*NAMES, "or", "and")
PLAIN = re.compile(
    rf"(?=.*[\d∞π√]|(?:{'|'.join(FUNCTIONS)})\()(?=.*[-+*/^=(\[,<>≤≥√π∞%∪×÷·])[\d\s+\-*/^=().,\[\]{{}}<>≤≥√π∞%∪×÷·a-zA-Z]+"
)
# A formula with symbols that numbers lack, before a unit or another word: 2√3 cm.
SIGNS = r"\d\s+\-*/^=().,<>×÷·"
BEFORE_WORD = re.compile(
    rf"(?=[{SIGNS}]*(?:[√∞π{SUPERSCRIPTS}]|sqrt|pi))(?:[{SIGNS}√∞π{SUPERSCRIPTS}]|sqrt|pi)++(?=[^\W\d_]{{2}}|[^\x00-\x7f])"
)
ENTRY = r"\s*[-+]?[\w√∞π./^]+\s*"
# A tuple or interval before another word, but not (1,200).
TUPLE = re.compile(rf"(?!.\d{{1,3}}(?:,\d{{3}})+\))[(\[]{ENTRY}(?:[,;]{ENTRY})+[)\]](?!\s*(?:[-+*/^=∪,]|or\b|and\b))")
PLAIN_SIGNS = r"\d\s+\-*/^=().,\[\]<>≤≥√π∞×÷·a-zA-Z"
PROSE = re.compile(r"[^\W\d_]{5,}")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\*?\}(?:\{[clr|]*\})?")  # its name is no prose: pmatrix, cases
DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")
SPACED_LIST = re.compile(r"\d\s*,\s+-?\d|(?:[()\[\]]|\\[{}]).*,")

_comparer = Comparer()


def looks_like_expression(gold: str) -> bool:
    """Return whether a gold answer has LaTeX or is a formula. Words, dates and times are neither."""
    if COMMAND.search(gold) or any(_formulas(gold)):
        return True
    text = fold(gold).strip()
    names = re.findall(r"[A-Za-z]{2,}", text)
    return bool(PLAIN.fullmatch(text)) and not DATE.fullmatch(text) and all(name in FUNCTIONS for name in names)


def parse_gold(gold: object, choices: Sequence[str] = ()) -> str | None:
    """Return a gold answer as LaTeX without dollar signs, or None if math-verify cannot parse it.

    Raises:
        UserError: math-verify is not installed.
    """
    if isinstance(gold, bool) or not isinstance(gold, int | float | str | Decimal):
        return None
    text = to_latex(_strip(_fold_digits(str(gold))))
    if PROSE.search(COMMAND.sub(" ", ENVIRONMENT.sub(" ", TEXT_COMMAND.sub(" ", text)))):
        return None  # math-verify reads words as products of letters
    return text if 0 < len(text) <= MAX_LENGTH and _parses(text) else None


def extract(text: str, lang: str, finished: bool, choices: Sequence[str] = ()) -> Reading:
    """Return the final expression of a response as LaTeX.

    It is that of the best candidate (see `find_candidates`) that can be parsed, or else the last formula between
    dollar signs, or else the last number. A cut response counts only if it has a complete candidate.
    """
    rules = rules_for(lang)
    text = _fold_digits(text)
    for candidate in find_candidates(text, rules, finished, rf"{BEFORE_EXPRESSION}|{_before_formula(rules)}"):
        if answer := _read_candidate(candidate, rules):
            return Reading(answer, candidate.read_by)
    if not finished:
        return NOTHING
    for formula in reversed(list(_formulas(text))):
        if answer := _read_formula(formula, rules):
            return Reading(answer, "end")
    reading = number.extract(text, lang)
    return Reading(None if reading.answer is None else str(reading.answer), reading.read_by)


def equal(first: str | None, second: str | None) -> bool:
    """Return whether two expressions are equal. None equals nothing, not even None."""
    if first is None or second is None:
        return False
    return first == second or _equal(*sorted((first, second)))


@lru_cache(maxsize=100_000)
def _equal(first: str, second: str) -> bool:
    numbers = [number.parse_gold(text) for text in (first, second)]
    if None not in numbers:
        return number.equal(*numbers)
    return _comparer.ask(first, second)


@lru_cache(maxsize=100_000)
def _parses(text: str) -> bool:
    return number.parse_gold(text) is not None or _comparer.ask(text)


def _before_formula(rules: LanguageRules) -> str:
    """Return the pattern of what follows the word for "answer" directly: plain notation and a final copula."""
    after = "|".join(phrase.after for phrase in rules.phrases if phrase.after)
    return (
        rf"\s*(?=[{PLAIN_SIGNS}]{{0,80}}[\^(])[{PLAIN_SIGNS}]{{1,80}}?(?:{after})[\s.।۔።]*(?:\n|$)" if after else NEVER
    )


def _formulas(text: str) -> Iterator[str]:
    """Yield the formulas between delimiters. Between two amounts is none: "$12 and Ann pays $16", "$5 or $10"."""
    position = 0
    while match := MATHS.search(text, position):
        formula = next(group for group in match.groups() if group)
        words = re.findall(r"(?<![\\A-Za-z])[^\W\d_]{2,}", TEXT_COMMAND.sub(" ", formula))
        count = sum(word not in FUNCTIONS and not word.isupper() for word in words)  # AB + CD are lengths
        before_amount = text[match.end() : match.end() + 1].isdecimal() or (count and formula[-1].isspace())
        if match[2] and (count >= 2 or (formula[0].isdecimal() and before_amount)):
            position = match.end() - 1  # the second sign may open a formula
        else:
            yield formula
            position = match.end()


def _read_candidate(candidate: Candidate, rules: LanguageRules) -> str | None:
    """Return the expression in a candidate: all of it, or else its first formula, or else the number it states."""
    span = candidate.span
    if candidate.read_by == "box":
        return _read_formula(span, rules)
    if formula := next(_formulas(span), None):
        return _read_formula(formula, rules)
    text = _strip(without_copula(span, rules).strip(" *_`.:"))
    if match := BEFORE_WORD.match(text):
        text = match[0].rstrip(" ,(")
    elif not looks_like_expression(text[:MAX_LENGTH]) and (match := TUPLE.match(text)):
        text = match[0].replace(";", ",")
    if len(text) <= MAX_LENGTH and looks_like_expression(text) and (answer := _read_formula(text, rules)):
        return answer
    value = number.answer_in_span(candidate._replace(span=normalise(span, rules.numbers)), rules.numbers)
    return None if value is None else str(value)


def _read_formula(formula: str, rules: LanguageRules) -> str | None:
    text = to_latex(_localise(_strip(formula), rules.numbers))
    return text if 0 < len(text) <= MAX_LENGTH and _parses(text) else None


def _localise(text: str, rules: NumberRules) -> str:
    """Write numbers and separators in English notation: 2,5 in French is 2.5, [1; 2[ is [1, 2).

    Without a decimal comma, and in lists with brackets or spaced commas, commas separate. A comma in braces, as LaTeX
    writes it within a number, does not.
    """
    text = re.sub(r"(?<=\d)\\[,;:!](?=\d{3}(?!\d))", "", text)
    spaced_list = SPACED_LIST.search(text) and ";" not in text
    grouped = re.fullmatch(r"-?\d{1,3}(,\d{2,3})*,\d{3}(\.\d+)?", text)
    is_local = bool(grouped or (rules.decimal_comma and not spaced_list))
    marks = r"(?:[.,]|\{,\})" if is_local else r"(?:\.|\{,\})"
    text = re.sub(
        rf"\d+(?:{marks}\d+)+",
        lambda match: _english_notation(match[0], rules) if is_local or "{" in match[0] else match[0],
        text,
    )
    text = text.replace(";", ",")
    if interval := re.fullmatch(r"([\[\]])([^\[\]]+)([\[\]])", text):
        opening, ends, closing = interval.groups()
        text = f"{'[' if opening == '[' else '('}{ends}{']' if closing == ']' else ')'}"
    return text


def _english_notation(digits: str, rules: NumberRules) -> str:
    digits = digits.replace("{,}", ",")
    found = find_numbers(digits, rules)
    return f"{found[0].value:f}" if len(found) == 1 and found[0].end == len(digits) else digits


def _strip(text: str) -> str:
    r"""Remove the delimiters of a formula, outer \text{} and a box, and write set braces as LaTeX does."""
    text = text.strip().rstrip(".。।").strip()
    for pattern in (r"\$\$(.+)\$\$", r"\$(.+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\\boxed\{(.+)\}"):
        if match := re.fullmatch(pattern, text, re.DOTALL):
            text = match[1].strip()
    if re.fullmatch(r"\{[^{}\\]*\}", text):
        text = rf"\{{{text[1:-1]}\}}"
    return text


def _fold_digits(text: str) -> str:
    """Write digits, full-width characters and minus signs in ASCII, and leave LaTeX as it is."""
    chars = []
    for char in ETHIOPIC_NUMERAL.sub(lambda match: str(ethiopic_value(match[0])), text):
        if char.isdecimal():
            chars.append(str(unicodedata.decimal(char)))
        elif unicodedata.category(char) != "Cf":
            chars.append(unicodedata.normalize("NFKC", char) if "\uff01" <= char <= "\uff5e" else char)
    return "".join(chars).replace("\u2212", "-").replace("،", ",").replace("٫", ".")

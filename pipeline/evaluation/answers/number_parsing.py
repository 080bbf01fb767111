"""Find numbers in text, as exact decimals, by the rules of its language."""

import re
import unicodedata
from decimal import MAX_PREC, Context, Decimal
from functools import lru_cache
from typing import NamedTuple

from pipeline.evaluation.answers.number_rules import NumberRules
from pipeline.evaluation.answers.plain_maths import superscripts_to_latex

EXACT = Context(prec=MAX_PREC)  # the default context would round sums and products to 28 significant digits

GROUP_SPACE = "\ue000"  # marks a no-break or narrow space, which NFKC would turn into an ordinary one
SPACES = dict.fromkeys(map(ord, "\u00a0\u202f\u2007\u2008\u2009\u2006\u2005\u2004\u205f"), GROUP_SPACE)
ETHIOPIC_NUMERAL = re.compile(r"[\u1369-\u137c]+")
MINUSES = dict.fromkeys(map(ord, "\u2212\u2010\u2011\ufe63\uff0d"), "-")
CURRENCY = r"[$€£¥₹฿₽৳₸円元]|US\$|R\$|(?i:\b(?:rs|tk|usd|eur|k?sh|tsh|kes)\b\.?)"
LETTERS = "A-Za-zÀ-ɏа-яА-ЯёЁ"  # letters of scripts with spaces between words
POWER = "\ue001"  # marks the exponent of a number
MAX_POWER_DIGITS = 10_000
EXPONENT = re.compile(rf"{POWER}([-+]?\d+)")
# × 10³, or e3 directly after the digits.
POWER_OF_TEN = re.compile(
    rf"(?:\s*(?:\\times|\\cdot|[×x·⋅*])\s*10{POWER}|(?<=\d)[eE](?=[-+]?\d{{1,5}}(?![{LETTERS}\d]|[.,]\d)))([-+]?\d+)"
)
FRACTION = re.compile(rf"(?: +(?P<over>\d+))?\s?/\s?(?P<under>\d+)(?:{POWER}(?P<exponent>\d+))?(?![\d/]|[.,]\d)")


class Number(NamedTuple):
    """A number in a text.

    Attributes:
        start: index of the first character, including sign and currency.
        end: index after the last character.
        value: numeric value.
    """

    start: int
    end: int
    value: Decimal


def normalise(text: str, rules: NumberRules) -> str:
    """Convert digits and minus signs to ASCII, fold compatibility forms, and remove LaTeX spacing and wrappers."""
    text = re.sub(r"(?i)\b(rs|tk|usd|eur|k?sh|tsh|kes)\.?(?=-?\d)", r"\1 ", _without_latex(fold(text)))
    names = [re.escape(fold(name)) for name in rules.currencies if name[-1].isalpha()]
    return re.sub(rf"(?<!\w)({'|'.join(names)})(?=-?\d)", r"\1 ", text) if names else text


def fold(text: str) -> str:
    """Apply NFKC, use ASCII digits and minus signs, mark grouping spaces, and remove format characters."""
    text = superscripts_to_latex(text.translate(SPACES))
    text = ETHIOPIC_NUMERAL.sub(lambda match: f" {ethiopic_value(match[0])} ", text)
    folded = unicodedata.normalize("NFKC", "".join(map(_prepare, text)))
    # Format characters (joiners, direction marks) would separate characters that are adjacent on the page.
    chars = [str(unicodedata.decimal(c)) if c.isdecimal() else c for c in folded if unicodedata.category(c) != "Cf"]
    folded = "".join(chars).translate(MINUSES).replace("⁄", "/")
    folded = re.sub(r"(?<=\d)٬(?=\d{2,3}(?!\d))", "", folded)  # the Arabic marks for thousands and decimals
    return re.sub(r"(?<=\d)[٫،](?=\d)", lambda mark: "." if mark[0] == "٫" else ",", folded)


def ethiopic_value(numeral: str) -> int:
    """Return the value of an Ethiopic numeral, in which ፻ (100) and ፼ (10,000) multiply what precedes them."""
    total = hundreds = units = 0
    for char in numeral:
        value = int(unicodedata.numeric(char))
        if value == 10_000:
            total = (total + hundreds + units or 1) * value
            hundreds = units = 0
        elif value == 100:
            hundreds, units = (units or 1) * value, 0
        else:
            units += value
    return total + hundreds + units


def _prepare(char: str) -> str:
    """Keep NFKC from merging unrelated digits: 5² is not 52, 2½ is not 21/2, ㎡ is not m2, ㏠ is no number."""
    kind, _, parts = unicodedata.decomposition(char).partition(">")
    if kind == "<compat" and not char.isnumeric() and re.search(r"\b003\d\b", parts):  # days, months and hours
        return " "
    if kind == "<fraction":
        return " " + char
    if kind in ("<super", "<sub"):
        return ""
    return " " if kind in ("<square", "<circle") else char


def _without_latex(text: str) -> str:
    text = text.replace("{,}", ",").replace(r"\!", "").replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"\\[,;: ]|(?<=\d)~(?=\d)", GROUP_SPACE, text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mathbb|textit)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=[\d)])\^(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))", rf"{POWER}\1\2", text)
    text = re.sub(r"(?<=[^\W_]|[)}])[\^_](?:\{[^{}]*\}|\\?\w+)", "", text)  # exponents, subscripts, degrees
    return re.sub(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r" \1\2/\3\4", text)


def find_numbers(text: str, rules: NumberRules) -> list[Number]:
    """Return all numbers of a text from `normalise`, with signs, powers, fractions and scale words applied."""
    space = f"[ {GROUP_SPACE}]" if rules.spaced_groups else GROUP_SPACE
    token = (
        rf"[1-9]\d{{0,2}}(?:(?:{space}\d{{3}})+|(?:['’]\d{{3}})+)(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*|(?<![\w.,)])\.\d+"
    )
    # Digits after a letter are part of a name (x2, A4), except in scripts without spaces.
    pattern = re.compile(rf"(?<![{LETTERS}])(?<![\d.,{POWER}])(?<!{POWER}[-+])(?P<whole>{token})")
    currency = _currency_pattern(rules.currencies)
    numbers: list[Number] = []
    for match in pattern.finditer(text):
        if numbers and match.start() < numbers[-1].end:
            continue
        value, end = _with_power_or_fraction(text, match, rules)
        if value is not None:
            numbers.append(_with_sign(text, Number(match.start(), end, value), currency))
    return _with_scales(text, numbers, rules)


@lru_cache(maxsize=512)
def _currency_pattern(names: tuple[str, ...]) -> str:
    more = [r"(?<!\w)" * name[0].isalpha() + re.escape(fold(name)) for name in names]
    return f"(?:{'|'.join([CURRENCY, *more])})"


def _with_power_or_fraction(text: str, match: re.Match[str], rules: NumberRules) -> tuple[Decimal | None, int]:
    """Return the value of the matched digits and its end. Parses 10^3, 3/4 and 2 1/2, but not dates (3/4/2024)."""
    before = text[max(0, match.start() - 3) : match.start()].rstrip()
    base = _resolve(match["whole"], rules, dollars=before.endswith("$"))
    exponent = EXPONENT.match(text, match.end())
    value, end = (_power(base, exponent[1]), exponent.end()) if exponent else (base, match.end())
    if scientific := POWER_OF_TEN.match(text, end):
        scale, end = _power(Decimal(10), scientific[1]), scientific.end()
        value = None if value is None or scale is None else EXACT.multiply(value, scale)
    fraction = FRACTION.match(text, end)
    if value is None or not fraction or before.endswith("/"):
        return value, end
    under = Decimal(fraction["under"])
    if fraction["exponent"]:
        under = _power(under, fraction["exponent"]) or Decimal(0)
    if not under:
        return value, end
    if fraction["over"]:
        return EXACT.add(value, Decimal(fraction["over"]) / under), fraction.end()
    return value / under, fraction.end()


def _power(base: Decimal, exponent: str) -> Decimal | None:
    """Return a power, or None if it is infinite or would have too many digits."""
    if len(exponent) > len(str(MAX_POWER_DIGITS)) or (not base and int(exponent) <= 0):
        return None
    times = abs(int(exponent))
    if times * len(base.as_tuple().digits) > MAX_POWER_DIGITS:
        return None
    power = EXACT.power(base, times)
    return power if int(exponent) >= 0 else 1 / power


def _resolve(token: str, rules: NumberRules, dollars: bool) -> Decimal:
    """Parse digits with separators. `dollars` is True if a dollar sign precedes them."""
    token = re.sub(f"[ '’{GROUP_SPACE}]", "", token)
    marks = [c for c in token if c in ".,"]
    if not marks:
        return Decimal(token)
    head, mark, tail = token.rpartition(marks[-1])
    if len(marks) > 1:
        if len(set(marks)) == 2:  # 1.234,56 and 1,234.56 are unambiguous
            return Decimal(re.sub("[.,]", "", head) + "." + tail)
        if re.fullmatch(r"\d{1,3}([.,]\d{3})+|\d{1,2}(,\d{2})+,\d{3}", token):  # the second form is Indian: 1,00,000
            return Decimal(token.replace(mark, ""))
        return Decimal(tail)  # a list: 1,2,3
    if re.fullmatch(r"[1-9]\d{0,2}", head) and len(tail) == 3 and _groups(rules, head, mark, tail, dollars):
        return Decimal(head + tail)
    return Decimal(f"{head or 0}.{tail}")


def _groups(rules: NumberRules, head: str, mark: str, tail: str, dollars: bool) -> bool:
    """Return whether a single separator before three digits separates thousands."""
    if not rules.decimal_comma:
        return mark == ","
    if tail == "000":
        return True
    if mark == ".":
        return rules.period_groups
    return dollars or (rules.american_commas and len(head) > 1) or (rules.comma_before_zero and tail[-1] == "0")


def _with_sign(text: str, number: Number, currency: str) -> Number:
    """Extend a number to the left over a currency symbol and a minus sign. A dash between two terms is not a sign."""
    offset = max(0, number.start - 40)
    head = text[offset : number.start]
    head = re.sub(rf"{currency}\s*$", "", head)
    dash = re.search(r"[-–](\s*)$", head)
    before = head[: dash.start()] if dash else ""
    stripped = before.rstrip(" *")
    between_terms = re.search(rf"[\d)%\]][\s{GROUP_SPACE}]*(?:{currency})?\s*$", before)  # 18 - 10, 5€ - 3€
    after_letter = re.search(rf"[{LETTERS}א-ת]$", before)  # COVID-19, x-3, כ-12
    if not dash or between_terms or after_letter or (dash[1] and stripped and stripped[-1] not in "=:("):
        return number._replace(start=offset + len(head))
    return Number(offset + len(before), number.end, EXACT.minus(number.value))


def _with_scales(text: str, numbers: list[Number], rules: NumberRules) -> list[Number]:
    """Apply scale words and join the parts of a number: 5 million, 3万5000, elfu 70."""
    before, after = _compile_scales(tuple(rules.scales_before.items())), _compile_scales(tuple(rules.scales.items()))
    result: list[Number] = []
    joinable = Decimal(0)  # scale of the previous number: a smaller part may follow it directly
    for number in numbers:
        scale, number = _scale_before(text, number, before)
        if scale == 1:
            scale, number = _scale_after(text, number, after)
        gap = text[result[-1].end : number.start] if result else "x"
        smaller = abs(number.value) < joinable and not gap.strip()
        if smaller and (scale > 1 or rules.joins == "spaced" or (rules.joins and not gap)):
            result[-1] = Number(result[-1].start, number.end, EXACT.add(result[-1].value, number.value))
        else:
            result.append(number)
        joinable = scale if scale > 1 else Decimal(0)
    return result


@lru_cache(maxsize=512)
def _compile_scales(scales: tuple[tuple[str, int], ...]) -> dict[re.Pattern[str], Decimal]:
    return {re.compile(fold(word), re.IGNORECASE): Decimal(10) ** power for word, power in scales}


def _scale_after(text: str, number: Number, scales: dict[re.Pattern[str], Decimal]) -> tuple[Decimal, Number]:
    position = number.end
    while text[position : position + 1] in (" ", GROUP_SPACE):
        position += 1
    for word, scale in scales.items():
        if match := word.match(text, position):
            return scale, Number(number.start, match.end(), EXACT.multiply(number.value, scale))
    return Decimal(1), number


def _scale_before(text: str, number: Number, scales: dict[re.Pattern[str], Decimal]) -> tuple[Decimal, Number]:
    offset = max(0, number.start - 20)
    for word, scale in scales.items():
        if match := re.search(rf"{word.pattern}\s+$", text[offset : number.start], re.IGNORECASE):
            return scale, Number(offset + match.start(), number.end, EXACT.multiply(number.value, scale))
    return Decimal(1), number

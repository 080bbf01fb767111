"""How a language writes numbers: decimal and grouping marks, words for powers of ten, currencies.

Eleven languages have rules of their own. The rules of any other follow from its CLDR locale.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pipeline.common.optional_imports import import_optional


class NumberRules(NamedTuple):
    """Rules to read the numbers of a language.

    Attributes:
        scales: powers of ten by the regular expression of the word, which follows the number (5 million).
        scales_before: the same for words that precede the number (elfu 70).
        decimal_comma: whether the decimal mark is a comma. If not, it is a period and the comma groups.
        spaced_groups: whether an ordinary space groups thousands (70 000). Narrow and no-break spaces always do.
        period_groups: with `decimal_comma`, whether a period before three digits groups (70.000) even if they are not
            000.
        american_commas: with `decimal_comma`, whether a comma before three digits groups if two or three digits precede
            it (22,800). After a dollar sign ($2,375) and before 000 (2,000) it always does.
        comma_before_zero: with `decimal_comma`, whether a comma before three digits groups if the last is 0 (2,500), as
            decimal fractions rarely end in 0.
        joins: whether a smaller number without a scale word continues a scaled one: adjacent (3万5000) or also after a
            space.
        currencies: further currency names or symbols that precede a number, upper and lower case as given.
    """

    scales: Mapping[str, int] = {}
    scales_before: Mapping[str, int] = {}
    decimal_comma: bool = False
    spaced_groups: bool = False
    period_groups: bool = False
    american_commas: bool = False
    comma_before_zero: bool = False
    joins: Literal["", "adjacent", "spaced"] = ""
    currencies: tuple[str, ...] = ()


HAND_WRITTEN = {
    "bn": NumberRules({r"হাজার": 3, r"লক্ষ|লাখ": 5, r"কোটি": 7}),
    "de": NumberRules(
        {r"tausend\b": 3, r"(?:Million(?:en)?|Mio)\b": 6, r"(?:Milliarden?|Mrd)\b": 9},
        decimal_comma=True,
        spaced_groups=True,
        period_groups=True,
    ),
    "en": NumberRules({r"thousand\b": 3, r"million\b": 6, r"billion\b": 9}),
    "es": NumberRules(
        {r"mil millones\b": 9, r"mil\b": 3, r"(?:millón|millones)\b": 6},
        decimal_comma=True,
        spaced_groups=True,
        period_groups=True,
        american_commas=True,  # both conventions occur: 12,345 is American, 2,345 is European
    ),
    "fr": NumberRules({r"mille\b": 3, r"millions?\b": 6, r"milliards?\b": 9}, decimal_comma=True, spaced_groups=True),
    "ja": NumberRules({r"千": 3, r"万": 4, r"億": 8}, joins="adjacent"),
    "ru": NumberRules(
        {r"тыс(?:яч[аиу]?)?\b": 3, r"(?:млн|миллион(?:а|ов)?)\b": 6, r"(?:млрд|миллиард(?:а|ов)?)\b": 9},
        decimal_comma=True,
        spaced_groups=True,
    ),
    "sw": NumberRules(scales_before={r"\belfu": 3, r"\blaki": 5, r"\bmilioni": 6}),
    "te": NumberRules({r"వేల|వేయి|వెయ్యి": 3, r"లక్ష": 5, r"కోటి|కోట్ల": 7}),
    "th": NumberRules({r"พัน": 3, r"หมื่น": 4, r"แสน": 5, r"ล้าน": 6}),
    "zh": NumberRules(  # 千米 and 千克 are units
        {r"千(?![米克瓦卡])": 3, r"[万萬]": 4, r"[亿億]": 8}, joins="adjacent"
    ),
}

# Words that CLDR spells differently from common usage, or lacks.
MORE_SCALES = {
    "fa": {"هزار": 3, "میلیون": 6},
    "hi": {"हजार": 3},
    "ms": {"ribu": 3, "juta": 6},
    "tr": {"bin(?:'?d[ıi]r)": 3, "milyon(?:'?dur)": 6},
    "ur": {"ہزار": 3, "لاکھ": 5, "کروڑ": 7},
    "vi": {"ngàn": 3, "tỉ": 9},
}
# Currency names in common usage that CLDR lacks.
MORE_CURRENCIES = {
    "ETB": ("Birr", "birr"),
    "GHS": ("GHC", "GH¢"),
    "NGN": ("N",),
    "RWF": ("Frw", "FRw"),
    "UGX": ("Shs", "Ush"),
}
UNSPACED = {"Hans", "Hant", "Jpan", "Kore", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"}  # no space ends a word


def cldr_number_rules(locale: Any, script: str, territory: str) -> NumberRules:
    """Derive the rules from a CLDR locale.

    Args:
        locale: the `babel.Locale`.
        script: script of the language, as an ISO 15924 code.
        territory: where the language is mostly spoken, for its currency; may be empty.
    """
    symbols = locale.number_symbols
    marks = symbols.get("latn") or symbols.get(locale.default_numbering_system) or {}
    # Arabic script has marks of its own. CLDR's Latin ones, if they differ from English, are those of Europe.
    decimal_comma = marks.get("decimal") == "," and (script != "Arab" or bool(locale.territory))
    group = marks.get("group") or ""
    after, before = _scale_words(locale, script)
    return NumberRules(
        after | {rf"(?:{word})(?![^\W\d_])": power for word, power in MORE_SCALES.get(locale.language, {}).items()},
        before,
        decimal_comma=decimal_comma,
        spaced_groups=decimal_comma and group.isspace(),
        period_groups=decimal_comma and group == ".",
        american_commas=decimal_comma,
        comma_before_zero=decimal_comma,
        joins="spaced" if script == "Kore" else "adjacent" if script in UNSPACED else "",
        currencies=_currencies(locale, territory),
    )


def _scale_words(locale: Any, script: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the words for powers of ten that follow and that precede the number, from CLDR's compact formats."""
    formats = locale.compact_decimal_formats
    after: dict[str, int] = {}
    before: dict[str, int] = {}
    for style in ("long", "short"):
        for patterns in formats.get(style, {}).values():
            for power, pattern in patterns.items():
                first, zeros, last = _split_pattern(pattern.pattern)
                scale = len(power) - len(zeros)
                for word, words in ((first, before), (last, after)):
                    # Single Latin letters are abbreviations (5M), and those of units as well.
                    if zeros and word and scale > 1 and not (word.isascii() and len(word) < 2):
                        words.setdefault(_word_pattern(word, script, words is before), scale)
        if after or before:
            break
        if script not in UNSPACED:
            break  # the short style abbreviates: only in Chinese, Japanese and Korean it has whole words
    longest_first = lambda words: dict(sorted(words.items(), key=lambda item: -len(item[0])))  # noqa: E731
    return longest_first(after), longest_first(before)


def _split_pattern(pattern: str) -> tuple[str, str, str]:
    """Split a compact format such as "00 million" into what precedes the digits, the digits, and what follows."""
    pattern = pattern.partition(";")[0].replace("'", "").strip("\u200e\u200f ")
    start, end = pattern.find("0"), pattern.rfind("0") + 1
    if start < 0:
        return "", "", ""
    return pattern[:start].strip(), pattern[start:end], pattern[end:].strip()


def _word_pattern(word: str, script: str, precedes: bool) -> str:
    escaped = word.replace("\xa0", " ").replace(".", r"\.")
    if precedes:
        return rf"(?<!\w){escaped}"
    return escaped if script in UNSPACED else rf"{escaped}(?![^\W\d_])"


def _currencies(locale: Any, territory: str) -> tuple[str, ...]:
    numbers = import_optional("babel.numbers")
    names: list[str] = []
    for code in numbers.get_territory_currencies(territory) if territory else []:
        names += [code, numbers.get_currency_symbol(code, locale), numbers.get_currency_symbol(code, "en")]
        names += [*MORE_CURRENCIES.get(code, ()), locale.currencies.get(code, "")]
    return tuple(dict.fromkeys(name.replace("\xa0", " ").replace("\u202f", " ") for name in names if name))

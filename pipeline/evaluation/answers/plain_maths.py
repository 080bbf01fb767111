"""Rewrite the mathematics of plain text as LaTeX. math-verify misreads it: 2√3 as 2, and log(2) as 2·l·o·g."""

import re
import unicodedata

SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
POWER = re.compile(rf"(?<=[\w)}}\]])(?<![{SUPERSCRIPTS}])[⁺⁻]?[⁰¹²³⁴-⁹ⁿ]+")
ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[A-Za-zπ])|\(((?:[^()]|\([^()]*\))*)\))")
NAMES = {name: "\\" + name for name in ("sin", "cos", "tan", "log", "ln", "exp", "pi")}
NAMES |= {"sqrt": "√", "inf": r"\infty", "oo": r"\infty"}
NAME = re.compile(rf"(?<![\\A-Za-z])(?:{'|'.join(NAMES)})(?![A-Za-z])")


def superscripts_to_latex(text: str) -> str:
    """Write superscript digits that follow a letter, a digit or a bracket as LaTeX does: 10⁻³ is 10^{-3}."""
    return POWER.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0]).replace(chr(0x2212), '-')}}}", text)


def to_latex(formula: str) -> str:
    """Write powers, roots, fractions, mixed numbers, infinity, products and functions of a formula as LaTeX does."""
    text = superscripts_to_latex(formula)
    text = re.sub("[¼½¾⅐-⅞]", _vulgar_fraction, text)
    text = re.sub(r"(?<![\d.,/^_}])(\d+) +(\d{1,4})/(\d{1,4})(?![\d/.])", _mixed_number, text)
    text = re.sub(r"(?<![\\A-Za-z])log(\d+)(?=\()", r"\\log_{\1}", text)
    text = NAME.sub(lambda match: NAMES[match[0]], text)
    text = re.sub(r"∞(?![A-Za-z])", r"\\infty", text).replace("·", r"\cdot ")
    return _roots(text).replace("√", r"\sqrt")  # a root without operand cannot be parsed then


def _roots(text: str) -> str:
    return ROOT.sub(lambda match: rf"\sqrt{{{match[1] or _roots(match[2])}}}", text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _mixed_number(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    return rf"{whole}\frac{{{over}}}{{{under}}}" if int(over) < int(under) else match[0]

r"""Find the parts of a response that state its answer: boxes, answer phrases, and the line after GSM8K's ####.

The last balanced `\boxed{}` takes precedence, then the last answer phrase of the language ("The answer is 8",
"答えは8です") or ####.
"""

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Literal, NamedTuple

from pipeline.evaluation.answers.language_rules import LanguageRules
from pipeline.evaluation.answers.number_parsing import fold
from pipeline.evaluation.answers.phrases import HAND_WRITTEN, Phrase

Answer = Decimal | str  # a number, or the canonical text of another type
ReadBy = Literal["box", "phrase", "####", "end", "none"]
SENTENCE_END = re.compile(r"[\n。!?।॥৷۔؟።။។៕꘎߸᠃᠉༎꓿։]|\.(?!\d)")
MARKUP = r"[\s*_$\\(\[{~≈\"'“”«»`:,、፡፦՝]*"
ABBREVIATION = r"[^\s\d.]{1,6}\."  # such as approx.
MAX_SPAN = 1000  # characters; otherwise a response that repeats a phrase without end takes minutes
MAX_GAP = 100  # characters of space and markup between a phrase and its answer
COPULAS = {phrase.copula for phrase in HAND_WRITTEN.values()}
BEFORE_NUMBER = r"[\s*$]*-?\d"
GoesOn = Callable[[str, str], bool]  # whether a sentence goes on after a full stop between two texts


class Candidate(NamedTuple):
    r"""A part of a response that may state its answer.

    Attributes:
        read_by: what announces it: "box" for \boxed{}, "phrase", or "####".
        span: the content of the box, or the text up to the end of the sentence.
        is_heading: whether the phrase ends in a colon, so that a whole solution may follow.
        is_last: whether the response has no number after the span.
    """

    read_by: ReadBy
    span: str
    is_heading: bool = False
    is_last: bool = True


class Reading(NamedTuple):
    """The answer in a response, in the canonical form of its type.

    Attributes:
        answer: the answer, or None if there is none.
        read_by: what announced it; "end" if nothing did and it is the last of its kind; "none" without an answer.
    """

    answer: Answer | None
    read_by: ReadBy


NOTHING = Reading(None, "none")


def find_candidates(
    text: str, rules: LanguageRules, finished: bool, direct: str = BEFORE_NUMBER, goes_on: GoesOn | None = None
) -> list[Candidate]:
    r"""Return the candidates, best first.

    Args:
        text: the response.
        rules: rules of its language.
        finished: whether the model ended the response itself. If it was cut at the token limit, only a balanced
            `\boxed{}` or a sentence that is complete counts.
        direct: regular expression of what follows the word for "answer" if the language or sentence has no copula.
        goes_on: which full stops are inside a sentence; if None, that of an abbreviation before a number (Rs. 500).
    """
    boxes = [Candidate("box", content) for content in _boxes(text)]
    spans = _phrase_spans(text, rules, finished, direct, goes_on or _before_number(direct))
    return list(dict.fromkeys([*reversed(boxes), *spans]))  # a response that repeats itself has many equal ones


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


def _phrase_spans(text: str, rules: LanguageRules, finished: bool, direct: str, goes_on: GoesOn) -> Iterator[Candidate]:
    """Yield the text after each answer phrase up to the end of its sentence, the last phrase first.

    If the text is not `finished`, omit a sentence without an end. A full stop at the very end may be a decimal point.
    """
    last_digit = max((match.start() for match in re.finditer(r"\d", text)), default=-1)
    for match in reversed(list(_phrase_pattern(rules.phrases, direct).finditer(text))):
        window = text[match.end() : match.end() + MAX_SPAN + MAX_GAP]
        rest = window.lstrip(" *_:：፡፦՝")
        if rest.startswith("\n"):
            rest = rest.lstrip("\n *_:").removeprefix("- ")  # on a new line "- 8" is a list item
        end = _sentence_end(rest, goes_on)
        if finished or (end and (end[0] != "." or end.end() < len(rest))):
            span = (rest[: end.start()] if end else rest)[:MAX_SPAN]
            is_last = finished and last_digit < match.end() + len(window) - len(rest) + len(span)
            yield Candidate("####" if match[0][0] == "#" else "phrase", span, match[0][-1] in ":：፡፦՝", is_last)


def _sentence_end(text: str, goes_on: GoesOn) -> re.Match[str] | None:
    """Return the end of the first sentence."""
    ends = SENTENCE_END.finditer(text)
    return next((end for end in ends if end[0] != "." or not goes_on(text[: end.start()], text[end.end() :])), None)


def _before_number(direct: str) -> GoesOn:
    """Return whether a full stop is that of an abbreviation, and the number follows."""
    abbreviation, number = re.compile(rf"(?:\D*\s)?{ABBREVIATION}"), re.compile(f"(?={direct}){BEFORE_NUMBER}")
    return lambda before, after: bool(abbreviation.fullmatch(f"{before}.") and number.match(after))


@lru_cache(maxsize=512)
def _phrase_pattern(phrases: tuple[Phrase, ...], direct: str) -> re.Pattern[str]:
    """Compile answer phrases, and GSM8K's ####."""
    joined = []
    for phrase in phrases:
        gap = r"[^\n.,:=。!?।\dをに]{0,40}?"  # "to answer that, …" and 答えを求めるには state no answer
        colon = r"\W{0,3}" if phrase.copula in COPULAS else gap  # "Igisubizo cya nyuma: 8"
        # The text may be in compatibility form or not.
        for noun, copula in dict.fromkeys([(fold(phrase.noun), fold(phrase.copula)), (phrase.noun, phrase.copula)]):
            # A noun without copula counts only next to an answer. A spaced dash is a copula ("Ответ - 8").
            joined.append(rf"(?:{noun})(?:(?={direct})|{gap}(?:{copula})|{colon}[:=：፡፦՝]|\s*[-–—](?=\s))")
    return re.compile("|".join([*joined, "#{4,}"]), re.IGNORECASE)

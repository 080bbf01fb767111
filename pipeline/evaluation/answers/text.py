"""Answers that are short texts, compared after normalization."""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from pipeline.evaluation.answers.candidates import NOTHING, Reading, find_candidates
from pipeline.evaluation.answers.language_rules import LanguageRules, rules_for
from pipeline.evaluation.answers.phrases import PHRASES

NAME = "text"
EXPECTED = "a short text with at least one letter or digit"
MAX_LENGTH = 300  # characters of an answer
TITLES = ("St", "Mt", "Dr", "Mr", "Mrs", "Ms", "Prof", "Sr", "Sra", "Sig", "Hr", "Dk", "TP")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")
CLOSERS = r"*_$`\"'”’»›」』)\]}-"  # may separate an answer from its copula instead of a space: Ankara'dır
ATTACHED = r"です|である|になります|となります|입니다|이에요|예요"  # copulas that end no other word
# A copula that may also be the end of a name: Bakıdır and Iğdır, 서울임 and 게임.
MAYBE_COPULA = re.compile(rf"(?<=\S) ?(?:{'|'.join(phrase.after for phrase in PHRASES.values() if phrase.after)})$")


def parse_gold(gold: object, choices: Sequence[str] = ()) -> str | None:
    """Return a gold answer without surrounding space, or None if it has no letter or digit."""
    if isinstance(gold, bool) or not isinstance(gold, int | float | str | Decimal):
        return None
    text = str(gold).strip()
    return text if normalise_text(text) else None


def extract(text: str, lang: str, finished: bool, choices: Sequence[str] = ()) -> Reading:
    """Return what the best candidate says (see `find_candidates`), or else the last line of a finished response."""
    rules = rules_for(lang)
    text = clean(text)
    for candidate in find_candidates(text, rules, finished, before_text(rules), _in_name):
        if answer := trim(candidate.span, rules):
            return Reading(answer, candidate.read_by)
    lines = [answer for line in text.splitlines() if (answer := trim(line, rules))] if finished else []
    return Reading(lines[-1], "end") if lines else NOTHING


def equal(first: str | None, second: str | None) -> bool:
    """Return whether two texts are equal after normalization. None equals nothing, not even None.

    One of them may end in a copula that the other lacks: Bakıdır equals Bakı.
    """
    if first is None or second is None:
        return False
    one, other = normalise_text(first), normalise_text(second)
    return one == other or MAYBE_COPULA.sub("", one) == other or one == MAYBE_COPULA.sub("", other)


def normalise_text(text: str) -> str:
    """Fold compatibility forms and case, and replace punctuation, symbols and spaces by single spaces."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    chars = [char if unicodedata.category(char)[0] in "LMN" else " " for char in folded if not _is_format(char)]
    return " ".join("".join(chars).split())


def clean(text: str) -> str:
    r"""Compose characters, remove direction marks and joiners, and unwrap \text{}."""
    composed = unicodedata.normalize("NFC", "".join(char for char in text if not _is_format(char)))
    return TEXT_COMMAND.sub(r"\1", composed)


def before_text(rules: LanguageRules) -> str:
    """Return the pattern of what follows the word for "answer" without a copula between: a text and a final copula."""
    after = "|".join(phrase.after for phrase in rules.phrases if phrase.after)
    return rf"\s[^\n.።۔।。]{{1,80}}?(?:{after})\s*(?:[\n.።۔।。]|$)" if after else r"(?!)"


def _in_name(before: str, after: str) -> bool:
    """Return whether a full stop is inside a name or date: example.com, U.S., St. Louis, J. K. Rowling, 1. Mai."""
    word, following = re.split(r"[^\w.,]", before[-20:])[-1], after.lstrip(" ")
    is_initial = bool(re.fullmatch(r"(?:\w\.)*[^\W\d]", word))
    if following == after:
        return after[:1].islower() or (is_initial and after[:1].isalpha())
    if word in TITLES:
        return following[:1].isupper()
    is_day = word.isdecimal() and len(word) <= 2
    if is_day and following[:1].islower():
        return True
    # The rest of a name is a few words: "George W. Bush.", but not "Vitamin C. It prevents scurvy."
    rest = re.split(r"[.\n]", following[:100], maxsplit=1)[0].split()
    is_short = 1 <= len(rest) <= 3 and all(re.fullmatch(r"[\w'’-]+", part) for part in rest)
    is_name = is_short and all(part[0].isupper() or part.isdecimal() for part in rest)
    return is_name and (is_day or (is_initial and word.isupper()))


def trim(span: str, rules: LanguageRules) -> str:
    """Remove markup, quotation marks, punctuation at both ends, and a copula that ends the sentence."""
    edge = r"[\s*_$`\"'“”«»‹›「」『』()\[\]{}:;,.،۔።।։。!?…~-]"
    return re.sub(rf"^{edge}+|{edge}+$", "", without_copula(span, rules))[:MAX_LENGTH]


def without_copula(span: str, rules: LanguageRules) -> str:
    """Remove a copula that ends the sentence. At the end of a word, it stays if other words end in the same way."""
    for phrase in rules.phrases:
        if phrase.after:
            copula = rf"(?:\s+|(?<=[{CLOSERS}]))(?:{phrase.after})|{ATTACHED}"
            span = re.sub(rf"(?<=\S)(?:{copula})[\s.。।۔።]*$", "", span)
    return span


def _is_format(char: str) -> bool:
    return unicodedata.category(char) == "Cf"

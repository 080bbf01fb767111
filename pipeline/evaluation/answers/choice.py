"""Answers that are one of several options: a letter from A to J, or the text of the option.

A response may name the option by its letter, by the corresponding letter of another script (খ, ب, Б, ข), by a circled
digit, or by its text.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache

from pipeline.common.errors import UserError
from pipeline.evaluation.answers.candidates import NOTHING, Candidate, Reading, find_candidates
from pipeline.evaluation.answers.choice_letters import LETTERS, SUFFIXES, letter_indices
from pipeline.evaluation.answers.language_rules import LanguageRules, base_language, rules_for
from pipeline.evaluation.answers.phrases import NEVER, Phrase
from pipeline.evaluation.answers.text import before_text, clean, normalise_text, without_copula

NAME = "choice"
EXPECTED = "the letter of one of the `choices` (A for the first) or its exact text"
# "Option B", in the languages whose benchmarks have options.
NOUNS = (
    r"\b(?:option|choice|letter|opción|opció|letra|opção|alternativa|opzione|lettre|lettera|Buchstabe|variant[ae]?|вариант"
    r"|варіант|буква|chaguo|herufi|pilihan|opsi|huruf|seçenek|şık|lựa chọn|phương án|zaɓi|àṣàyàn|nhọrọ|inketho|ukhetho"
    r"|filannoo|optie|opcja|επιλογή)\b|אפשרות|الخيار(?!ات)|الاختيار|الحرف|گزینه|آپشن|विकल्प(?!ों)|বিকল্প(?!গু|সমূহ)|ఎంపిక(?!లు)"
    r"|விருப்பம்|વિકલ્પ(?!ો)|ਵਿਕਲਪ(?!ਾਂ)|ಆಯ್ಕೆ(?!ಗಳು)|ตัวเลือก|ข้อ|选项|選項|选择|選擇|選択肢|선택지|보기|ምርጫ"
)
# 选B, ตอบ ข: "choose", "answer" before a letter.
VERBS = r"(?<![不可])[选選][择擇]?(?=[\s:：(（「“]*[A-J])|(?<!คำ)ตอบ(?=[\s:]*[A-Jกขคง](?![฀-๿]))"
COUNTERS = r"번|项|項"  # what makes a number the place of an option
ARTICLE = rf"(?:(?:the|la|el|le|a|o|die|το|η|{NOUNS})\s+|[lL]['’])?"
WORD = r"(?-i:[a-z])\s+\w"  # "a cat" and "respuesta a la pregunta" name no option
OPEN, CLOSE = r"[\s*_(（\\\[{<«\"'“「『`$]*", r"[)）\\\]}>.:：,;、。।۔።»\"'”」』`*_$]"

# Vowel signs and tones, which are not letters to regular expressions.
MARKS = "\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0981-\u0983\u09bc-\u09cd\u0a01-\u0a4d\u0a81-\u0acd\u0b82-\u0bcd"
MARKS += "\u0c00-\u0c04\u0c3e-\u0c4d\u0c81-\u0ccd\u0d00-\u0d4d\u0d82-\u0ddf\u0e31-\u0e3a\u0e47-\u0e4e\u17b6-\u17d3"
NUMBER_END = rf"(?:{CLOSE}|{SUFFIXES}|\s)*"
# Marks precede the rest, since the normalization of a phrase would compose w and the first of them.
LETTER_END = rf"(?:(?={SUFFIXES}|[^{MARKS}\w]|$)|(?<=[A-J])(?![{MARKS}\dA-Za-zÀ-ɏḀ-ỿ]))"
TWO = rf"{OPEN}{ARTICLE}{OPEN}\w+{CLOSE}*\s*(?:[/,&、،或和と]|\b\w{{1,4}}\b)\s*{OPEN}[A-J](?!\w)"  # "A or B" names none


def parse_gold(gold: object, choices: Sequence[str] = ()) -> str | None:
    """Return the letter of a gold answer, A to J, which is a letter or the exact text of an option, or None if neither.

    Raises:
        UserError: the gold answer is the letter of one option and the text of another.
    """
    if isinstance(gold, bool) or not isinstance(gold, int | float | str | Decimal):
        return None
    text = str(gold).strip()
    letters = LETTERS["Latin"][: len(choices)]
    by_text = [letter for letter, choice in zip(letters, choices, strict=True) if choice.strip() == text]
    by_letter = [text] if len(text) == 1 and text in letters else []
    if len({*by_text, *by_letter}) > 1:
        raise UserError(f"`gold` {text[:40]!r} names two of the `choices`; make their texts distinct")
    return next(iter([*by_text, *by_letter]), None)


def extract(text: str, lang: str, finished: bool, choices: Sequence[str] = ()) -> Reading:
    """Return the letter, A to J, of the option that a response names.

    It is that of the best candidate (see `_candidates`), or else, in a finished response, that of a first line that is
    an option and nothing else, or else that of the last "option B", or else that of a last or first line that begins
    with a letter, or else the only option whose text occurs in the last line, or in the response.
    """
    options = _Options(lang, tuple(choices))
    rules = rules_for(lang)
    text = clean(text)
    lines = [line for line in text.splitlines() if line.strip()]
    stated, named = _candidates(text, rules, finished, options)
    opening = options.opening(lines)  # what follows may explain why "option A" is wrong
    for candidate in stated if opening else [*stated, *named]:
        span = candidate.span
        if letter := options.at_start(span) or options.mentioned(span) or options.numbered(without_copula(span, rules)):
            return Reading(letter, candidate.read_by)
    if not finished or not lines:
        return NOTHING
    if opening:
        return Reading(opening, "end")
    for line in (lines[-1], lines[0]):
        if letter := options.labelled(line) or options.mentioned(line) or options.at_ordinal(line):
            return Reading(letter, "end")
    letter = options.mentioned(text)
    return Reading(letter, "end") if letter else NOTHING


def equal(first: str | None, second: str | None) -> bool:
    """Return whether two answers are the same option. None equals nothing, not even None."""
    return first is not None and first == second


class _Options:
    """The options of a question, and the ways to name one of them.

    Attributes:
        letter: regular expression of a letter that names an option.
    """

    def __init__(self, lang: str, choices: tuple[str, ...]) -> None:
        self.texts = [normalise_text(choice) for choice in choices]
        self.symbols = [_with_symbols(choice) for choice in choices]
        self.indices, self.letter = _letters(base_language(lang), len(choices))

    def at_start(self, span: str) -> str | None:
        """Return the option that a span begins with: its text, or a letter that is not part of a word."""
        text = normalise_text(span)
        exact = [index for index, option in enumerate(self.texts) if text == option]
        begins = [index for index, option in enumerate(self.texts) if option and _begins(text, option)]
        if found := exact or begins:
            longest = max(len(self.texts[index]) for index in found)
            return self._only([index for index in found if len(self.texts[index]) == longest], span)
        match = re.match(rf"{OPEN}{ARTICLE}{OPEN}({self.letter}){LETTER_END}", span)
        if match and re.match(TWO, span):
            return None
        if match and not re.match(WORD, span[match.start(1) :]):
            return self._name(self.indices[match[1]])
        return None

    def numbered(self, span: str) -> str | None:
        """Return the option of a span that is a number: that whose text begins with it, or else that in this place."""
        match = re.fullmatch(rf"{OPEN}(?:(?:the|la|el|le|a|o|die)\s+)?{OPEN}(\d{{1,9}}){NUMBER_END}", span)
        if (letter := self.at_ordinal(span)) or not match:
            return letter
        begins = [index for index, option in enumerate(self.texts) if re.match(rf"{int(match[1])}(?! ?\d)", option)]
        if begins:
            return self._name(begins[0]) if len(begins) == 1 else None
        return self._at(int(match[1]))

    def at_ordinal(self, span: str) -> str | None:
        """Return the option of a span that is a number with a noun or a counter: "option 3", 3번."""
        noun, counter = rf"{OPEN}{ARTICLE}(?i:{NOUNS}){OPEN}(\d{{1,2}})", rf"{OPEN}(\d{{1,2}})\s*(?:{COUNTERS})"
        match = re.fullmatch(rf"(?:{noun}|{counter}){NUMBER_END}", span)
        return self._at(int(match[1] or match[2])) if match else None

    def labelled(self, line: str) -> str | None:
        """Return the option of a line that is a letter, or begins with one and a mark: "B", "(B) Nairobi", "B: ..."."""
        match = re.match(rf"{OPEN}({self.letter})(?:\s*(?:{CLOSE}|\s[-–—]\s)|(?:{SUFFIXES})?\s*$)", line)
        return self._name(self.indices[match[1]]) if match else None

    def opening(self, lines: Sequence[str]) -> str | None:
        """Return the option of a first line that is its letter, or its letter and text, unless it begins a list."""
        if letter := self.labelled(lines[0]) if len(lines) > 1 else None:
            words = normalise_text(lines[0]).split(maxsplit=1)[1:]
            others = {self.labelled(line) for line in lines[1:]} - {None, letter}
            if not others and words in ([], [self.texts[ord(letter) - ord("A")]]):
                return letter
        return None

    def mentioned(self, text: str) -> str | None:
        """Return the only option whose text occurs in a text. An option within a longer one that occurs is ignored."""
        normalised = normalise_text(text)
        found = [index for index, option in enumerate(self.texts) if option and _contains(normalised, option)]
        longest = [
            i for i in found if not any(self.texts[i] in self.texts[j] for j in found if self.texts[j] != self.texts[i])
        ]
        return self._only(longest, text) if len({self.texts[index] for index in longest}) == 1 else None

    def _only(self, found: list[int], text: str) -> str | None:
        """Return the option of equal normalised texts. Of several (-5 and 5), the text must begin with it."""
        if len(found) > 1 or not self.texts[found[0]]:
            begins = [index for index in found if _with_symbols(text).startswith(self.symbols[index])]
            longest = max((len(self.symbols[index]) for index in begins), default=0)
            found = [index for index in begins if len(self.symbols[index]) == longest]
        return self._name(found[0]) if len(found) == 1 else None

    def _at(self, place: int) -> str | None:
        return self._name(place - 1) if 1 <= place <= len(self.texts) else None

    @staticmethod
    def _name(index: int) -> str:
        return LETTERS["Latin"][index]


def _candidates(
    text: str, rules: LanguageRules, finished: bool, options: _Options
) -> tuple[list[Candidate], list[Candidate]]:
    """Return the candidates that state an answer, and those that name an option, each best first.

    The first follow the phrases for an answer, or an option with a copula ("The correct option is B"). The second
    ("option B", "answer B", or with a copula of the language) are weaker, since "Option A is wrong" may follow the
    answer. In verb-final languages, "answer B" states it.
    """
    letter = rf"{OPEN}(?!{WORD})(?:{options.letter}){LETTER_END}"
    noun, name = rf"(?:{NOUNS})(?!{letter})", rf"(?:\W*(?:{NOUNS}))?{letter}"
    phrases = [p if p.after else p._replace(noun=rf"(?:{p.noun})(?!{name})") for p in rules.phrases]

    def find(direct: str, *phrases: Phrase) -> list[Candidate]:
        return find_candidates(text, rules._replace(phrases=phrases), finished, direct)

    verb, correct = Phrase(VERBS, NEVER), Phrase(noun, r"\b(?:is|es|é|est|ist|ni|là|adalah)\b")
    stated = find(rf"{letter}|{before_text(rules)}", *phrases, verb, correct)
    weak = Phrase(noun, "|".join(phrase.copula for phrase in rules.phrases))
    named = find(letter, Phrase(NOUNS, NEVER), *(Phrase(phrase.noun, NEVER) for phrase in rules.phrases))
    return stated, [*named, *find(NEVER, weak)]


@lru_cache(maxsize=512)
def _letters(language: str, count: int) -> tuple[Mapping[str, int], str]:
    indices = letter_indices(language, count)
    indices = indices | {name.lower(): index for name, index in indices.items() if len(name) == 1}
    longest_first = sorted(indices, key=lambda name: -len(name))
    return indices, "|".join(map(re.escape, longest_first))


def _with_symbols(text: str) -> str:
    """Return a text without spaces and markup, but with signs and other symbols."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return re.sub(r"[\s*_`$]|\\[()]", "", folded)


def _begins(text: str, option: str) -> bool:
    return text.startswith(option) and (_is_unspaced(option) or not text[len(option) : len(option) + 1].strip())


def _contains(text: str, option: str) -> bool:
    return option in text if _is_unspaced(option) else f" {option} " in f" {text} "


def _is_unspaced(text: str) -> bool:
    """Return whether a text is in a script that writes no space between words, or attaches particles to them."""
    names = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR")
    return any(unicodedata.name(char, "").startswith(names) for char in text)

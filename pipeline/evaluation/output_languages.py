"""The language of the outputs: of the whole output, line by line, and word by word.

Line and word pass rates follow Marchisio et al., "Understanding and Mitigating Language Confusion in LLMs" (arXiv
2406.20052), with lingua in place of fastText, and with scripts in place of a list of English words.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.accuracy import BY_SCRIPT, percent
from pipeline.evaluation.answers.language_rules import base_language, parse_tag, script_names
from pipeline.evaluation.significance import wilson_interval

NONE = "none"  # a text without an identifiable language, for example a bare number
MIN_LINE_WORDS = 5  # shorter lines are not judged, as in the paper
MIN_LATIN_LETTERS = 4  # shorter Latin words, and capitalized ones, may be variables, units or names
MIN_WORD_LETTERS = 2  # a single letter names an option or a variable
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
LETTERS_PER_WORD = 2  # in a script without spaces, one word is counted for so many letters
MORE_CANDIDATES = ("de", "es", "fr")  # for lingua to choose from, if it knows only one language of the data
LINGUA_NAMES = {"fil": "tl", "no": "nb"}  # languages that CLDR and lingua call differently
MATHS = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]|```.*?```|https?://\S+", re.DOTALL)


class Word(NamedTuple):
    """A run of letters of one script.

    Attributes:
        text: the letters.
        script: first word of their Unicode names, such as LATIN.
    """

    text: str
    script: str

    @property
    def num_words(self) -> int:
        """Number of words that the run is counted as."""
        return max(1, len(self.text) // LETTERS_PER_WORD) if self.script in UNSPACED else 1


class Identifier:
    """Identifies languages with lingua among those of the data, the pivot and English, and by script.

    Args:
        languages: codes of the languages of the data.
        pivot: code of the pivot.

    Raises:
        UserError: lingua is not installed.
    """

    def __init__(self, languages: Iterable[str], pivot: str) -> None:
        lingua = import_optional("lingua")
        known = {language.iso_code_639_1.name.lower(): language for language in lingua.Language.all()}
        wanted = dict.fromkeys(map(base_language, [*languages, pivot, "en"]))
        candidates = {
            lang: known[LINGUA_NAMES.get(lang, lang)] for lang in wanted if LINGUA_NAMES.get(lang, lang) in known
        }
        if len(candidates) == 1:
            candidates |= {lang: known[lang] for lang in MORE_CANDIDATES}
        self._names = {language: lang for lang, language in candidates.items()}
        self._scripts = {script for lang in candidates for script in expected_scripts(lang)}
        self._detector = lingua.LanguageDetectorBuilder.from_languages(*candidates.values()).build()
        self._identified: dict[str, str] = {}

    def knows(self, lang: str) -> bool:
        """Return whether lingua can identify the language of a code. If not, only its script can.

        Lingua knows a language in its usual script only, so not hin_Latn.
        """
        base = base_language(lang)
        return base in self._names.values() and expected_scripts(lang) == expected_scripts(base)

    def identify(self, text: str, lang: str) -> str:
        """Return the language of a text that is expected to be in `lang`.

        Returns:
            A language code without script and region; `none` if no language is identified, for example without words;
            or a script, such as "Han script", if no candidate language uses it. If lingua lacks `lang`, a text in the
            script of `lang` is taken to be in `lang`.
        """
        script = main_script(text, lang)
        if script is None:
            return NONE
        if not self.knows(lang) and script in expected_scripts(lang):
            return base_language(lang)
        if script not in self._scripts:
            return f"{'Han' if script == 'CJK' else script.capitalize()} script"
        if text not in self._identified:
            language = self._detector.detect_language_of(text)
            self._identified[text] = NONE if language is None else self._names[language]
        return self._identified[text]


def language_metrics(rows: Sequence[dict[str, Any]], pivot: str = "en") -> dict[str, dict[str, Any]]:
    """Measure in which languages the outputs are.

    Args:
        rows: rows of `generations.jsonl`.
        pivot: code of the pivot.

    Returns:
        For each requested language: `judged_by`, lingua or script; `found`, the number of outputs by language, where
        `none` means that the output has no identifiable language (for example a bare number). Fractions of all other
        outputs: `share` in the requested language, with its 95 % Wilson interval `low` to `high`; `pivot_share` in the
        pivot's language, None if it cannot be told apart; `other_share` in any other. `line_pass_rate` (LPR): fraction
        of outputs whose lines are all in the requested language, among those with a line of at least five words.
        `word_pass_rate` (WPR): fraction of these without a word in another script. `other_script_words`: fraction of
        words that are in another script. Any is None if there is nothing to divide by.

    Raises:
        UserError: lingua is not installed.
    """
    by_lang: dict[str, list[str]] = {}
    for row in rows:
        outputs = [sample["output"] for sample in row.get("samples") or [row]]
        by_lang.setdefault(row["lang"], []).extend(map(_prose, outputs))
    identifier = Identifier(by_lang, pivot)
    return {lang: _language_metrics(lang, texts, pivot, identifier) for lang, texts in sorted(by_lang.items())}


def _language_metrics(lang: str, texts: Sequence[str], pivot: str, identifier: Identifier) -> dict[str, Any]:
    base, pivot = base_language(lang), base_language(pivot)
    counts = Counter(identifier.identify(text, lang) for text in texts)
    identified = counts.total() - counts[NONE]
    by_lingua = identifier.knows(lang)
    apart = base != pivot and (by_lingua or not set(expected_scripts(lang)) & set(expected_scripts(pivot)))
    low, high = wilson_interval(counts[base], identified) if identified else (None, None)
    line_errors = [_has_line_error(text, lang, identifier) for text in texts]
    passed = [text for text, has_error in zip(texts, line_errors, strict=True) if has_error is False]
    words = [word for text in texts for word in split_words(text) if len(word.text) >= MIN_WORD_LETTERS]
    other_words = sum(word.num_words for word in words if word.script not in expected_scripts(lang))
    judged = len(line_errors) - line_errors.count(None)
    return {
        "judged_by": "lingua" if by_lingua else "script",
        "share": _divide(counts[base], identified),
        "low": low,
        "high": high,
        "pivot_share": _divide(counts[pivot], identified) if apart else None,
        "other_share": _divide(identified - counts[base] - (counts[pivot] if apart else 0), identified),
        "line_pass_rate": _divide(len(passed), judged),
        "word_pass_rate": _divide(sum(not _has_word_error(text, lang) for text in passed), len(passed)),
        "other_script_words": _divide(other_words, sum(word.num_words for word in words)),
        "found": dict(counts.most_common()),
    }


def _divide(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _has_line_error(text: str, lang: str, identifier: Identifier) -> bool | None:
    """Return whether a line is in another language, or None if no line is long enough and in an identifiable one."""
    lines = [line for line in text.splitlines() if sum(word.num_words for word in split_words(line)) >= MIN_LINE_WORDS]
    found = {identifier.identify(line, lang) for line in lines} - {NONE}
    return found != {base_language(lang)} if found else None


def _has_word_error(text: str, lang: str) -> bool:
    scripts = expected_scripts(lang)
    foreign = [word for word in split_words(text) if word.script not in scripts and len(word.text) >= MIN_WORD_LETTERS]
    return any(word.script != "LATIN" or _is_latin_word(word) for word in foreign)


def _is_latin_word(word: Word) -> bool:
    """Return whether Latin letters among those of another script are a word, not a variable, unit or name."""
    return word.text.islower() and len(word.text) >= MIN_LATIN_LETTERS


def expected_scripts(lang: str) -> tuple[str, ...]:
    """Return the scripts of a language, as Unicode names begin. Latin if they are unknown."""
    return script_names(parse_tag(lang).script) or ("LATIN",)


def main_script(text: str, lang: str) -> str | None:
    """Return the script of most letters of a text that is expected to be in `lang`, or None if it has no words.

    Single letters are no words in a script with spaces. Neither are short or capitalized Latin words, if `lang` has
    another script and the text has no other Latin word.
    """
    words = split_words(text)
    latin = [word for word in words if word.script == "LATIN"]
    if "LATIN" not in expected_scripts(lang) and not any(map(_is_latin_word, latin)):
        words = [word for word in words if word.script != "LATIN"]
    if not any(len(word.text) >= MIN_WORD_LETTERS or word.script in UNSPACED for word in words):
        return None
    letters = Counter[str]()
    for word in words:
        letters[word.script] += len(word.text)
    return letters.most_common(1)[0][0]


def split_words(text: str) -> list[Word]:
    """Return the runs of letters of one script. Marks belong to the letter before them."""
    words: list[Word] = []
    letters, current = "", ""
    for char in [*unicodedata.normalize("NFKC", text), " "]:
        script = _script(char)
        if script == "MARK" and letters:
            letters += char
            continue
        if script != current and letters:
            words.append(Word(letters, current))
            letters = ""
        current = script
        if script not in ("", "MARK"):
            letters += char
    return words


@lru_cache(maxsize=20_000)
def _script(char: str) -> str:
    """Return the script of a letter, "MARK" for marks and joiners, and an empty string for other characters."""
    category = unicodedata.category(char)
    if category[0] == "M" or category == "Cf" or char in "'’ʼ":
        return "MARK"
    if category[0] != "L":
        return ""
    name = re.split("[ -]", unicodedata.name(char, ""))[0]
    return {"IDEOGRAPHIC": "CJK", "MODIFIER": "MARK", "MASCULINE": "", "FEMININE": "", "MICRO": ""}.get(name, name)


def _prose(text: str) -> str:
    r"""Return a text without formulas, code, links, and the names of LaTeX commands."""
    return re.sub(r"\\[A-Za-z]+", " ", MATHS.sub(" ", text))


def output_languages_table(evaluation: dict[str, Any]) -> str:
    """Format the output languages as a Markdown table. Return an empty string if they were not identified."""
    metrics = evaluation.get("output_languages")
    if not metrics:
        return ""
    pivot = evaluation.get("pivot", "the pivot")
    lines = [
        "Languages of the responses:\n",
        f"| asked in | judged by | answered in it % | 95 % interval | in {pivot} % | in others % | other languages | "
        "lines pass (LPR) % | words pass (WPR) % | words in another script % |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for lang, score in metrics.items():
        others = ", ".join(f"{name} {n}" for name, n in score["found"].items() if name != base_language(lang))
        interval = f"{percent(score['low'])} to {percent(score['high'])}"
        shares = " | ".join(percent(score.get(key)) for key in ("pivot_share", "other_share"))
        rates = " | ".join(
            percent(score.get(key)) for key in ("line_pass_rate", "word_pass_rate", "other_script_words")
        )
        cells = f"{lang} | {score.get('judged_by', 'lingua')} | {percent(score['share'])} | {interval} | {shares}"
        lines.append(f"| {cells} | {others or '–'} | {rates} |")
    if any(score.get("judged_by") == "script" for score in metrics.values()):
        lines += [
            "",
            f"Judged by script{BY_SCRIPT}: lingua lacks the language, so an answer in another language of its script "
            "passes.",
        ]
    return "\n".join(lines)

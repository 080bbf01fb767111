"""Rules to read answers in the language of a code: ISO 639-1, ISO 639-3, or BCP 47 with script and region.

A language with rules of its own (sw) uses them. Any other follows its CLDR locale (ha, am), or else the main language
of its script, or else English.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.answers.number_rules import HAND_WRITTEN, NumberRules, cldr_number_rules
from pipeline.evaluation.answers.phrases import PHRASES, Phrase

ANSWER_LANGUAGES = tuple(HAND_WRITTEN)  # the languages with rules of their own

# Codes of individual languages that are the usual form of a language in CLDR, and that CLDR does not list as aliases.
MORE_ALIASES = {
    "als": "sq",
    "ekk": "et",
    "fat": "ak",
    "khk": "mn",
    "kmr": "ku",
    "lvs": "lv",
    "nob": "nb",
    "pbt": "ps",
    "plt": "mg",
    "tl": "fil",
    "tw": "ak",
    "uzn": "uz",
    "ydd": "yi",
}
# Names of scripts in Unicode that differ from the first word of their English name in CLDR.
SCRIPT_NAMES = {
    "Beng": ("BENGALI",),
    "Cans": ("CANADIAN",),
    "Hans": ("CJK",),
    "Hant": ("CJK",),
    "Hani": ("CJK",),
    "Jpan": ("HIRAGANA", "KATAKANA", "CJK"),
    "Kore": ("HANGUL", "CJK"),
    "Mtei": ("MEETEI",),
    "Mymr": ("MYANMAR",),
    "Nkoo": ("NKO",),
    "Olck": ("OL",),
    "Orya": ("ORIYA",),
}


class LanguageRules(NamedTuple):
    """Rules to read answers in one language.

    Attributes:
        name: what the rules are from: "rules of sw", "CLDR ha", "script Arab", or "neutral".
        numbers: how numbers are written.
        phrases: phrases that announce an answer, in the language and in English, which models mix in.
    """

    name: str
    numbers: NumberRules
    phrases: tuple[Phrase, ...]


class LanguageTag(NamedTuple):
    """A language code in CLDR's form: zh, Hans, CN. Unknown parts are empty."""

    language: str
    script: str
    territory: str


@lru_cache(maxsize=1024)
def parse_tag(code: str) -> LanguageTag:
    """Return the language of a code in CLDR's form, with its usual script and territory if the code has none.

    ISO 639-3 codes become ISO 639-1 where CLDR does so (hau is ha), individual languages their usual form (swh is sw).
    Upper and lower case are equal. Variants and extensions are ignored.
    """
    tag = _split(code)
    if tag.language in HAND_WRITTEN and not (tag.script or tag.territory):
        return tag._replace(script=_USUAL_SCRIPTS.get(tag.language, "Latn"))
    likely = _cldr("likely_subtags")
    for key in ("_".join(filter(None, tag)), "_".join(filter(None, tag[:2])), tag.language):
        if full := likely.get(key):
            usual = _split(full)
            return LanguageTag(tag.language, tag.script or usual.script, tag.territory or usual.territory)
    return tag


# Scripts of the languages in HAND_WRITTEN, so that they need no CLDR data.
_USUAL_SCRIPTS = {"bn": "Beng", "ja": "Jpan", "ru": "Cyrl", "te": "Telu", "th": "Thai", "zh": "Hans"}


def _split(code: str) -> LanguageTag:
    language, *rest = re.split("[-_]", code)
    language = language.lower()
    if language not in HAND_WRITTEN:
        alias = MORE_ALIASES.get(language) or _cldr("language_aliases").get(language) or language
        language, *more = alias.split("_")
        language = MORE_ALIASES.get(language, language)
        rest += more
    script = next((part.title() for part in rest if re.fullmatch("[A-Za-z]{4}", part)), "")
    territory = next((part.upper() for part in rest if re.fullmatch("[A-Za-z]{2}|[0-9]{3}", part)), "")
    return LanguageTag(language, script, territory)


def _cldr(table: str) -> Mapping[str, str]:
    return import_optional("babel.core").get_global(table)


def base_language(lang: str) -> str:
    """Return the language of a code without script and region, as in CLDR: zh for zh_Hans-CN, sw for swh_Latn."""
    return parse_tag(lang).language


@lru_cache(maxsize=1024)
def rules_for(lang: str) -> LanguageRules:
    """Return the rules to read answers in the language of a code. Every code has some."""
    tag = parse_tag(lang)
    if tag.language in HAND_WRITTEN:
        return LanguageRules(f"rules of {tag.language}", HAND_WRITTEN[tag.language], _phrases(tag.language))
    if locale := _locale(tag, _split(lang)):
        rules = cldr_number_rules(locale, tag.script, tag.territory)
        return LanguageRules(f"CLDR {tag.language}", rules, _phrases(tag.language))
    if tag.script:
        main = _split(_cldr("likely_subtags").get(f"und_{tag.script}", "en"))
        if main.language in HAND_WRITTEN or _locale(main, main):
            return rules_for(main.language)._replace(name=f"script {tag.script}")
    return rules_for("en")._replace(name="neutral")


def language_in_name(name: str) -> str | None:
    """Return the last language code in a name such as afrimgsm_cot_amh, or None.

    Codes of two letters other than those of `ANSWER_LANGUAGES` may be English words, so they count only at the end.
    """
    *parts, last = re.split("[-_]", name)
    hand_written = [part for part in (*parts, last) if part in HAND_WRITTEN]
    three_letters = [part for part in parts if re.fullmatch("[a-z]{3}", part)]
    others = [*three_letters, *([last] if re.fullmatch("[a-z]{2,3}", last) else [])]
    codes = hand_written or [part for part in others if rules_for(part).name.startswith(("rules of", "CLDR"))]
    return codes[-1] if codes else None


def _phrases(language: str) -> tuple[Phrase, ...]:
    return tuple(PHRASES[name] for name in dict.fromkeys((language, "en")) if name in PHRASES)


def _locale(tag: LanguageTag, given: LanguageTag) -> Any:
    """Return the CLDR locale for the parts of a code that were given, or None if CLDR has no data on the language."""
    babel = import_optional("babel")
    localedata = import_optional("babel.localedata")
    for parts in (given, (given.language, given.script), (given.language, "", given.territory), (given.language,)):
        name = "_".join(filter(None, parts))
        if localedata.exists(name):
            return babel.Locale.parse(name)
    return None


@lru_cache(maxsize=1024)
def script_names(script: str) -> tuple[str, ...]:
    """Return how the Unicode names of a script's letters begin, such as ARABIC for Arab. Empty if it is unknown."""
    if not script or script in SCRIPT_NAMES:
        return SCRIPT_NAMES.get(script, ())
    name = import_optional("babel").Locale("en").scripts.get(script, "")
    return (name.split()[0].upper(),) if name else ()

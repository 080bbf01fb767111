"""Language codes of every form, and where the rules for them are from."""

import re

import pytest
from babel.localedata import locale_identifiers

from pipeline.evaluation.answers.language_rules import base_language, parse_tag, rules_for, script_names
from pipeline.evaluation.answers.number import extract_answer
from pipeline.evaluation.answers.phrases import PHRASES


@pytest.mark.parametrize(
    ("code", "tag"),
    [
        ("en", ("en", "Latn", "")),
        ("zh", ("zh", "Hans", "")),
        ("ZH_hant-tw", ("zh", "Hant", "TW")),
        ("hau", ("ha", "Latn", "NG")),
        ("swh_Latn", ("sw", "Latn", "TZ")),
        ("arb_Arab", ("ar", "Arab", "EG")),
        ("pa-PK", ("pa", "Arab", "PK")),
        ("twi", ("ak", "Latn", "GH")),
        ("tgl", ("fil", "Latn", "PH")),
        ("xx", ("xx", "", "")),
    ],
)
def test_parse_tag_any_form(code, tag):
    assert parse_tag(code) == tag


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("sw", "rules of sw"),
        ("swa", "rules of sw"),
        ("de-CH", "rules of de"),
        ("amh", "CLDR am"),
        ("ibo", "CLDR ig"),
        ("vai", "CLDR vai"),
        ("sr-Latn", "CLDR sr"),
        ("arz", "script Arab"),
        ("fon", "script Latn"),
        ("xx", "neutral"),
        ("akk", "neutral"),  # CLDR has its script, Xsux, but no language with data in it
    ],
)
def test_rules_for_says_where_rules_are_from(code, name):
    assert rules_for(code).name == name


def test_every_language_of_afrimgsm_follows_its_own_rules():
    names = "amh ewe hau ibo kin lin lug orm sna sot swa twi vai wol xho yor zul"
    codes = re.findall("[a-z]+", names)
    assert all(rules_for(code).name.split()[0] in ("rules", "CLDR") for code in codes)
    assert len({base_language(code) for code in codes}) == len(codes)


def test_script_names_of_unicode():
    for script, letter_name in {"Arab": "ARABIC", "Ethi": "ETHIOPIC", "Beng": "BENGALI", "Vaii": "VAI"}.items():
        assert script_names(script) == (letter_name,)
    assert script_names("Jpan") == ("HIRAGANA", "KATAKANA", "CJK")
    assert script_names("") == ()


def test_every_language_of_cldr_reads_plain_numbers():
    for lang in sorted({name.split("_")[0] for name in locale_identifiers()}):
        assert rules_for(lang).name.startswith(("rules of", "CLDR")), lang
        for text, answer in (("1 + 2 = 3 x", 3), (r"so \boxed{8}", 8), ("#### 12", 12)):
            assert extract_answer(text, lang) == answer, lang


@pytest.mark.parametrize("lang", PHRASES)
def test_phrases_are_of_cldr_languages(lang):
    """A phrase under another code than the one that `parse_tag` returns would never be used."""
    assert base_language(lang) == lang

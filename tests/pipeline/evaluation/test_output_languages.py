"""Languages of planted outputs: whole outputs, lines, words; lingua's languages and others."""

import pytest

from pipeline.evaluation.output_languages import language_metrics, output_languages_table, split_words
from tests.pipeline.evaluation.test_consistency import SENTENCES, row

HAUSA = "Ta sayar da tuffa goma sha biyu a kasuwa kowace rana, don haka amsar ita ce 12."
AMHARIC = "በየቀኑ አሥራ ሁለት ፖም በገበያ ትሸጣለች፣ ስለዚህ መልሱ 12 ነው።"
HINDI = "राम के पास तीन सेब हैं और वह चार और खरीदता है, इसलिए उसके पास कुल सात सेब हैं।"
KOREAN = "그녀는 매일 시장에서 사과 열두 개를 팔기 때문에 답은 12입니다."


def rows_of(lang, *outputs):
    return [row(str(i), lang, "12", output=output) for i, output in enumerate(outputs)]


def test_language_metrics_of_real_sentences():
    rows = [row("a", lang, "12", output=text) for lang, text in SENTENCES.items()]
    rows += [row("b", "sw", "12", output=SENTENCES["en"]), row("c", "sw", "12", output="12 + 3 = 15")]
    metrics = language_metrics(rows)
    assert {lang for lang, score in metrics.items() if score["share"] == 1} == set(SENTENCES) - {"sw"}
    assert metrics["sw"]["share"] == 0.5 and metrics["sw"]["found"] == {"sw": 1, "en": 1, "none": 1}
    assert (metrics["sw"]["pivot_share"], metrics["sw"]["other_share"]) == (0.5, 0)
    assert metrics["en"]["pivot_share"] is None
    region = language_metrics(rows_of("zh_Hans-CN", SENTENCES["zh"]))["zh_Hans-CN"]
    assert region["share"] == 1 and region["found"] == {"zh": 1}
    numbers = language_metrics(rows_of("sw", "12"))["sw"]
    assert numbers["share"] is None and numbers["low"] is None and numbers["found"] == {"none": 1}
    assert numbers["line_pass_rate"] is None and numbers["other_script_words"] is None


def test_language_metrics_tells_pivot_from_other_languages():
    rows = rows_of("ko", KOREAN, SENTENCES["en"], SENTENCES["th"]) + rows_of("de", SENTENCES["de"])
    score = language_metrics(rows, "en")["ko"]
    assert (score["share"], score["pivot_share"], score["other_share"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert score["found"] == {"ko": 1, "en": 1, "Thai script": 1}  # Thai is not among the languages of the data


def test_language_metrics_line_and_word_pass_rates():
    mixed_lines = f"{KOREAN}\n{SENTENCES['en']}"
    mixed_words = "그녀는 매일 market 에서 사과 열두 개를 팔기 때문에 답은 12입니다."
    allowed = "Tom 은 매일 x 와 y 를 5 kg 씩 시장에서 사고 $apples = 3$ 입니다."
    short = "apples and oranges"
    score = language_metrics(rows_of("ko", KOREAN, mixed_lines, mixed_words, allowed, short), "en")["ko"]
    assert score["line_pass_rate"] == 3 / 4  # the short line is not judged
    assert score["word_pass_rate"] == 2 / 3
    assert 0 < score["other_script_words"] < 0.5
    swahili = language_metrics(rows_of("sw", SENTENCES["sw"], f"{SENTENCES['sw']} วัน"))["sw"]
    assert (swahili["line_pass_rate"], swahili["word_pass_rate"]) == (1, 0.5)


def test_language_metrics_without_lingua_model_judges_script():
    rows = rows_of("hau", HAUSA, SENTENCES["en"], AMHARIC) + rows_of("amh", AMHARIC, SENTENCES["en"])
    metrics = language_metrics([*rows, *rows_of("fr", SENTENCES["fr"])], "eng")
    assert metrics["hau"]["judged_by"] == metrics["amh"]["judged_by"] == "script"
    assert metrics["fr"]["judged_by"] == "lingua"
    # English is in the script of Hausa: a collapse into it cannot be seen. In Amharic it can.
    assert (metrics["hau"]["share"], metrics["hau"]["pivot_share"]) == (pytest.approx(2 / 3), None)
    assert metrics["hau"]["found"] == {"ha": 2, "Ethiopic script": 1}
    assert (metrics["amh"]["share"], metrics["amh"]["pivot_share"]) == (0.5, 0.5)
    table = output_languages_table({"output_languages": metrics, "pivot": "eng"})
    assert "| hau | script | 66.7 |" in table and "lingua lacks the language" in table and "in eng %" in table


def test_language_metrics_judges_unusual_script_of_language_by_script():
    romanized = "Ram ke paas teen seb hain aur woh chaar aur kharidta hai. Isliye uske paas kul saat seb hain."
    metrics = language_metrics([*rows_of("hin_Latn", romanized), *rows_of("hin_Deva", HINDI)])
    assert (metrics["hin_Latn"]["judged_by"], metrics["hin_Latn"]["found"]) == ("script", {"hi": 1})
    assert (metrics["hin_Deva"]["judged_by"], metrics["hin_Deva"]["found"]) == ("lingua", {"hi": 1})


def test_language_metrics_english_alone_is_told_from_other_languages():
    score = language_metrics(rows_of("en", SENTENCES["en"], SENTENCES["de"], SENTENCES["zh"]))["en"]
    assert (score["judged_by"], score["found"]) == ("lingua", {"en": 1, "de": 1, "Han script": 1})


@pytest.mark.parametrize(
    ("lang", "output", "found"),
    [
        ("en", "A B C D", "none"),
        ("en", r"\boxed{B}", "none"),
        ("en", "**C**", "none"),
        ("ru", "Б", "none"),
        ("zh", "x = 18", "none"),
        ("th", "18 kg", "none"),
        ("th", "Nairobi", "none"),
        ("th", "ข", "th"),
        ("th", "The answer is 18", "en"),
        ("zh", "Tom 有 18 kg 苹果", "zh"),
        ("en", "18 apples", "en"),
    ],
)
def test_language_metrics_letters_that_are_no_words(lang, output, found):
    rows = [row("0", other, "12", output=SENTENCES[other]) for other in ("de", "en", "fr", "sw")]
    rows = [*(other for other in rows if other["lang"] != lang), *rows_of(lang, output)]
    assert language_metrics(rows)[lang]["found"] == {found: 1}


def test_language_metrics_line_without_words_is_not_judged():
    metrics = language_metrics(rows_of("sw", f"a b c d e f\n{SENTENCES['sw']}", "a b c d e f"))
    assert metrics["sw"]["line_pass_rate"] == 1
    assert language_metrics(rows_of("sw", "a b c d e f"))["sw"]["line_pass_rate"] is None


def test_split_words_by_script():
    words = [(word.text, word.script, word.num_words) for word in split_words("Tomは3個のりんご, don't สวัสดี")]
    assert words[:3] == [("Tom", "LATIN", 1), ("は", "HIRAGANA", 1), ("個", "CJK", 1)]
    assert words[-2][:2] == ("don't", "LATIN") and words[-1][1] == "THAI"

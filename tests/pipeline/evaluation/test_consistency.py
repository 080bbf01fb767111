"""Agreement of planted answers, also of different types, and the tables of all consistency metrics."""

import sys

import pytest

from pipeline.evaluation.consistency import agreement, consistency_metrics, consistency_tables

SENTENCES = {
    "bn": "তিনি প্রতিদিন বাজারে বারোটি আপেল বিক্রি করেন, তাই উত্তর হল 12।",
    "de": "Sie verkauft jeden Tag zwölf Äpfel auf dem Markt, also ist die Antwort 12.",
    "en": "She sells twelve apples at the market every day, so the answer is 12.",
    "es": "Ella vende doce manzanas en el mercado cada día, así que la respuesta es 12.",
    "fr": "Elle vend douze pommes au marché chaque jour, donc la réponse est 12.",
    "ja": "彼女は毎日市場でりんごを十二個売るので、答えは12です。",
    "ru": "Она каждый день продаёт на рынке двенадцать яблок, поэтому ответ 12.",
    "sw": "Anauza matufaha kumi na mawili sokoni kila siku, kwa hivyo jibu ni 12.",
    "te": "ఆమె ప్రతిరోజూ మార్కెట్లో పన్నెండు ఆపిల్స్ అమ్ముతుంది, కాబట్టి సమాధానం 12.",
    "th": "เธอขายแอปเปิลสิบสองผลที่ตลาดทุกวัน ดังนั้นคำตอบคือ 12",
    "zh": "她每天在市场上卖十二个苹果，所以答案是12。",
}


def row(pair_id, lang, answer, gold="1", output="x"):
    return {"pair_id": pair_id, "lang": lang, "output": output, "answer": answer, "correct": answer == gold}


def test_agreement_counts_planted_answers():
    planted = {  # pair_id: answers in de, en, sw
        "all right": ("1", "1", "1"),
        "all wrong alike": ("7", "7.0", "7"),
        "two alike": ("1", "1", "2"),
        "no answers": (None, None, None),
    }
    rows = [
        row(name, lang, answer)
        for name, answers in planted.items()
        for lang, answer in zip(("de", "en", "sw"), answers, strict=True)
    ]
    rows.append(row("english only", "en", "1"))
    metrics = agreement(rows)
    assert metrics["pairwise"] == {"de": {"en": 0.75, "sw": 0.5}, "en": {"sw": 0.5}}
    assert metrics["mean_pairwise"] == pytest.approx(1.75 / 3)
    assert metrics["wrong"] == {"pairs": 3, "same": 3, "share": 1.0}  # missing answers are not pairs
    two_wrong = agreement([row("a", "en", "7"), row("a", "de", "8"), row("b", "en", "3"), row("b", "de", "3")])
    assert two_wrong["wrong"] == {"pairs": 2, "same": 1, "share": 0.5}
    total = metrics["all_languages"]
    assert (total["problems"], total["same"], total["correct"], total["share"]) == (4, 2, 1, 0.5)
    assert total["low"] < 0.5 < total["high"]


def test_agreement_of_answers_of_any_type():
    planted = {  # pair_id: type, answers in de, en
        "expression": ("expression", r"\frac{1}{2}", "0.5"),
        "choice": ("choice", "B", "B"),
        "other choice": ("choice", "B", "C"),
        "text": ("text", "Nairobi", "nairobi"),
    }
    rows = [
        row(name, lang, answer) | {"answer_type": answer_type}
        for name, (answer_type, *answers) in planted.items()
        for lang, answer in zip(("de", "en"), answers, strict=True)
    ]
    assert agreement(rows)["pairwise"] == {"de": {"en": 0.75}}


def test_agreement_without_common_questions():
    metrics = agreement([row("a", "en", "1"), row("b", "de", "1")])
    assert metrics["pairwise"] == {"de": {"en": None}}
    assert metrics["mean_pairwise"] is None and metrics["all_languages"]["share"] is None
    assert metrics["wrong"] == {"pairs": 0, "same": 0, "share": None}
    assert agreement([row("a", "en", "1")])["all_languages"]["problems"] == 0


def test_consistency_tables_format_all_metrics():
    rows = [row("a", lang, "12", "12", SENTENCES[lang]) for lang in ("de", "en")]
    rows += [row("b", "de", "3", "12", SENTENCES["en"]), row("b", "en", "12", "12", SENTENCES["en"])]
    text = consistency_tables({"languages": {"de": {}, "en": {}}, **consistency_metrics(rows)})
    assert "same answer to a problem in 50.0 % on average" in text
    assert "same answer to 1 of 2 problems (50.0 %, 9.5 to 90.5); it is correct for 1 of them." in text
    assert "| de |  | 50.0 |" in text and "| en | 50.0 |  |" in text
    assert "| de | lingua | 50.0 | 9.5 to 90.5 | 50.0 | 0.0 | en 1 | 50.0 | 100.0 | 0.0 |" in text
    assert "| en | lingua | 100.0 | 34.2 to 100.0 | – | 0.0 | – | 100.0 | 100.0 | 0.0 |" in text
    assert consistency_tables({"languages": {"de": {}}}) == ""


def test_consistency_metrics_without_lingua(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lingua", None)
    metrics = consistency_metrics([row("a", "en", "1"), row("a", "de", "1")])
    assert metrics["output_languages"] is None and metrics["agreement"]["mean_pairwise"] == 1
    assert "pip install lingua-language-detector" in capsys.readouterr().out

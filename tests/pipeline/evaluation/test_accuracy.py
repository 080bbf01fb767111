"""Accuracy and consistency with the pivot, on planted answers."""

from decimal import Decimal

import pytest

from pipeline.evaluation.accuracy import accuracy_table, score_by_language, unfinished_sentence, unfinished_warning
from pipeline.evaluation.dataset import Example


def make_examples(golds: dict[str, list[int]]):
    return [Example(str(i), lang, [], Decimal(g)) for lang, column in golds.items() for i, g in enumerate(column)]


def test_score_by_language_counts_planted_answers():
    examples = make_examples({"en": [1, 2, 3, 4], "de": [1, 2, 3, 4], "sw": [1, 2]})
    planted = {"en": [1, 2, 9, None], "de": [1, 8, 9, None], "sw": [None, 2]}
    answers = [None if a is None else Decimal(a) for column in planted.values() for a in column]
    finished = [i not in (3, 8, 9) for i in range(len(examples))]
    result = score_by_language(examples, answers, finished, "en")
    languages = result["languages"]
    assert list(languages) == ["de", "en", "sw"]
    assert (languages["en"]["n"], languages["en"]["correct"], languages["en"]["accuracy"]) == (4, 2, 0.5)
    assert languages["en"]["consistency_with_pivot"] is None
    # de agrees on 1 and on the wrong 9; two missing answers do not agree.
    assert (languages["de"]["correct"], languages["de"]["consistency_with_pivot"]) == (1, 0.5)
    assert (languages["sw"]["correct"], languages["sw"]["consistency_with_pivot"]) == (1, 0.5)
    assert result["macro"] == {"accuracy": pytest.approx((0.5 + 0.25 + 0.5) / 3), "consistency_with_pivot": 0.5}
    table = accuracy_table(result)
    assert "| de | 4 | 0 | 25.0 |" in table
    assert "| en | 4 | 1 | 50.0 | 15.0 to 85.0 | – |" in table
    evaluation = result | {"settings": {"max_new_tokens": 8}}
    assert unfinished_sentence(evaluation) == "3 of 10 responses are unfinished, cut at 8 tokens: en 1, sw 2."
    assert "30.0 % of the responses" in unfinished_warning(evaluation)


def test_unfinished_warning_only_above_three_percent():
    examples = make_examples({"en": [1] * 100})
    for unfinished, warned in ((0, False), (3, False), (4, True)):
        finished = [i >= unfinished for i in range(100)]
        result = score_by_language(examples, [Decimal(1)] * 100, finished, "en")
        warning = unfinished_warning(result | {"settings": {"max_new_tokens": 8}})
        assert bool(warning) == warned and "\n" not in warning


def test_unfinished_counts_responses_and_not_problems():
    """4 of 160 responses to 20 problems are unfinished, each to another problem."""
    result = score_by_language(make_examples({"en": [1] * 20}), [Decimal(1)] * 20, [i >= 4 for i in range(20)], "en")
    result["sampling"] = {"num_samples": 8, "languages": {"en": {"n": 20, "unfinished": 4}}}
    evaluation = result | {"settings": {"max_new_tokens": 8}}
    assert unfinished_sentence(evaluation) == "4 of 160 responses are unfinished, cut at 8 tokens: en 4."
    assert unfinished_warning(evaluation) == ""  # 2.5 %
    assert "| en | 20 | 4 |" in accuracy_table(evaluation)


def test_score_by_language_without_pivot():
    result = score_by_language(make_examples({"de": [1]}), [Decimal(1)], [True], "en")
    assert result["languages"]["de"]["consistency_with_pivot"] is None
    assert result["macro"] == {"accuracy": 1.0, "consistency_with_pivot": None}
    assert "–" in accuracy_table(result)


def test_score_by_language_of_any_type_and_pivot_code():
    golds = {"a": (r"\frac{1}{2}", "expression"), "b": ("B", "choice"), "c": ("Paris", "text")}
    examples = [
        Example(pair_id, lang, [], gold, answer_type)
        for lang in ("eng_Latn", "fra")
        for pair_id, (gold, answer_type) in golds.items()
    ]
    answers = ["0.5", "C", "PARIS", "0.50", "B", None]
    result = score_by_language(examples, answers, [True] * 6, "en")
    assert result["pivot"] == "eng_Latn"
    assert [score["correct"] for score in result["languages"].values()] == [2, 2]
    assert result["languages"]["fra"]["consistency_with_pivot"] == pytest.approx(1 / 3)
    assert result["languages"]["eng_Latn"]["consistency_with_pivot"] is None

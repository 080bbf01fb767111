"""What the token limit cut, on planted responses."""

from itertools import chain

import pytest

from pipeline.evaluation.truncation import truncation_metrics, truncation_table, truncation_warning


def rows_of(lang, tokens, characters, unfinished, n=20):
    return [{"lang": lang, "output": "x" * characters, "tokens": tokens, "finished": i >= unfinished} for i in range(n)]


def evaluation_of(*rows):
    return {"truncation": truncation_metrics(list(chain(*rows))), "settings": {"max_new_tokens": 64}}


def test_truncation_metrics_of_planted_responses():
    evaluation = evaluation_of(rows_of("en", 20, 80, 0), rows_of("am", 60, 40, 5))
    assert evaluation["truncation"]["am"] == {
        "responses": 20,
        "unfinished": 5,
        "unfinished_share": 0.25,
        "tokens_per_response": 60,
        "tokens_per_character": 1.5,
    }
    table = truncation_table(evaluation)
    assert "| am | 25.0 | 60 | 1.50 | 43 |" in table and "| en | 0.0 | 20 | 0.25 | 256 |" in table
    samples = [{"lang": "en", "samples": rows_of("en", 4, 8, 1, n=3)}]
    assert truncation_metrics(samples)["en"]["unfinished_share"] == pytest.approx(1 / 3)


def test_truncation_metrics_count_reasoning_of_server():
    rows = [row | {"reasoning": "y" * 60} for row in rows_of("en", 25, 40, 0)]
    assert truncation_metrics(rows)["en"]["tokens_per_character"] == 0.25


def test_truncation_metrics_without_tokens():
    rows = [{"lang": "en", "output": "", "finished": True}]
    evaluation = evaluation_of(rows)
    assert evaluation["truncation"]["en"]["tokens_per_character"] is None
    assert "| en | 0.0 | – | – | – |" in truncation_table(evaluation)
    assert truncation_table({}) == ""


def test_truncation_warning_if_languages_differ():
    english, amharic = rows_of("en", 20, 80, 0), rows_of("am", 20, 80, 2)
    assert "10.0 % of the responses in am are unfinished, 0.0 % in en" in truncation_warning(
        evaluation_of(english, amharic)
    )
    assert truncation_warning(evaluation_of(english, rows_of("am", 20, 80, 1))) == ""  # five points
    german, costly = rows_of("de", 20, 80, 1), rows_of("am", 60, 80, 1)
    warning = truncation_warning(evaluation_of(english, german, costly))
    assert "64 tokens are 85 characters in am, and 256 in the median language" in warning and "\n" not in warning
    assert truncation_warning(evaluation_of(english, rows_of("am", 60, 80, 0))) == ""  # nothing was cut
    assert truncation_warning(evaluation_of(amharic)) == ""  # one language

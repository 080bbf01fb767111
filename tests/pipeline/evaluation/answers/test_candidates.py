"""The search for announced answers in degenerate responses: the work grows with their length, not with its square."""

import pytest

from pipeline.evaluation.answers import candidates
from pipeline.evaluation.answers.candidates import Candidate, find_candidates
from pipeline.evaluation.answers.language_rules import rules_for


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("lang", "unit"), [("en", "#"), ("zh", "答案是"), ("en", "The answer is "), ("en", "####\n")])
def test_find_candidates_of_endless_repetition(monkeypatch, lang, unit, finished):
    searched = []
    sentence_end = candidates._sentence_end

    def search(text, goes_on):
        searched.append(len(text))
        return sentence_end(text, goes_on)

    monkeypatch.setattr(candidates, "_sentence_end", search)
    found = find_candidates(unit * 5000, rules_for(lang), finished)
    assert sum(searched) <= 5000 * 2 * candidates.MAX_SPAN
    assert len(found) <= candidates.MAX_SPAN


def test_find_candidates_after_more_hashes():
    assert find_candidates("###### 8", rules_for("en"), True) == [Candidate("####", "8")]

"""pass@k against all subsets, the majority vote against counting, the interval of the mean against a simulation."""

import random
from collections import Counter
from decimal import Decimal
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from pipeline.evaluation.answers.number import equal as answers_equal
from pipeline.evaluation.sampling_statistics import (
    majority_vote,
    mean_interval,
    pass_at_k,
    sampling_metrics,
    sampling_table,
)
from pipeline.evaluation.significance import wilson_interval


def test_pass_at_k_equals_mean_over_subsets() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            results = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                slow = fmean(any(subset) for subset in combinations(results, k))
                assert pass_at_k(n, correct, k) == pytest.approx(slow, abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over simulated runs is 1 - (1 - p)^k, which the plug-in estimate with the observed accuracy is not."""
    rng = np.random.default_rng(0)
    for p in (0.05, 0.3):
        counts = rng.binomial(10, p, 20_000)
        expected = 1 - (1 - p) ** 5
        by_count = np.array([pass_at_k(10, count, 5) for count in range(11)])
        assert by_count[counts].mean() == pytest.approx(expected, abs=0.008)
        assert abs((1 - (1 - counts / 10) ** 5).mean() - expected) > 0.02


def test_majority_vote_equals_counting() -> None:
    rng = random.Random(0)
    for _ in range(500):
        answers = [rng.choice([None, 1, 2, 3]) for _ in range(rng.randrange(1, 9))]
        counts = Counter(answer for answer in answers if answer is not None)
        winners = {answer for answer, count in counts.items() if count == max(counts.values())}
        vote = majority_vote(answers, lambda a, b: a == b)
        if not winners:
            assert vote is None
        else:
            assert vote is not None and answers[vote] in winners
            assert vote == min(answers.index(answer) for answer in winners)


def test_majority_vote_joins_equal_answers() -> None:
    answers = [None, Decimal("0.5"), Decimal("8"), Decimal("8.0"), Decimal("0.50"), Decimal("8.00")]
    assert majority_vote(answers, answers_equal) == 2


@pytest.mark.parametrize(("questions", "samples", "a", "b"), [(50, 8, 0.3, 0.3), (250, 8, 0.5, 1.5), (250, 2, 2, 2)])
def test_mean_interval_covers(questions: int, samples: int, a: float, b: float) -> None:
    """The difficulty of the questions is Beta(a, b) distributed."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        values = rng.binomial(samples, rng.beta(a, b, questions)) / samples
        low, high = mean_interval(values.tolist(), samples)
        hits += low <= a / (a + b) <= high
    assert 0.93 <= hits / 1000 <= 0.97


def test_mean_interval_without_spread() -> None:
    assert mean_interval([1.0] * 20, 8) == wilson_interval(20, 20)
    assert mean_interval([0.5] * 20, 8) == wilson_interval(80, 160)
    assert mean_interval([0.5], 8) == wilson_interval(0.5, 1)  # eight answers to one question are one observation


def row(lang: str, *correct: bool, vote: bool) -> dict:
    samples = [{"correct": value, "finished": value} for value in correct]
    return {"lang": lang, "correct": fmean(correct), "vote_correct": vote, "samples": samples}


def test_sampling_metrics_and_table() -> None:
    rows = [
        row("en", True, True, False, vote=True),
        row("en", False, False, True, vote=False),
        row("sw", False, False, False, vote=False),
        row("sw", True, False, False, vote=True),
    ]
    metrics = sampling_metrics(rows, 3)
    english, swahili = metrics["languages"]["en"], metrics["languages"]["sw"]
    assert english["mean_accuracy"] == pytest.approx(0.5) == english["majority_vote"]
    assert english["pass_at_k"] == pytest.approx({"1": 0.5, "2": (1 + 2 / 3) / 2, "3": 1.0})
    assert swahili["pass_at_k"] == pytest.approx({"1": 1 / 6, "2": 1 / 3, "3": 0.5})
    assert (english["unfinished"], swahili["unfinished"]) == (3, 5)
    assert english["low"] < 0.5 < english["high"]
    assert metrics["macro"]["mean_accuracy"] == pytest.approx(1 / 3)
    table = sampling_table(metrics).splitlines()
    assert table[-2].startswith("| sw | 6 | 5 | 16.7 | ") and table[-2].endswith(" | 16.7 | 33.3 | 50.0 | 50.0 |")

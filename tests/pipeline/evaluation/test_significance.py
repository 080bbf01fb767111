"""Wilson's interval against published values, McNemar's test against scipy, the bootstrap against theory."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from pipeline.evaluation.significance import holm, mcnemar, paired_bootstrap, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published(correct, n, low, high):
    assert wilson_interval(correct, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 61), (900, 1000)])
def test_mcnemar_equals_binomial_test(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_large_sample_is_normal():
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(2000, 1))
    low, high, mean_low, mean_high = paired_bootstrap(differences)
    half = norm.ppf(0.975) * differences.std() / np.sqrt(2000)
    assert (low[0], high[0]) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.002)
    assert (mean_low, mean_high) == (low[0], high[0])


def test_bootstrap_keeps_translations_together():
    """Ten copies of one language are no more evidence than one: the interval of their mean must not shrink."""
    column = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], size=(100, 1))
    copies = paired_bootstrap(np.tile(column, (1, 10)))
    assert copies[2:] == pytest.approx(paired_bootstrap(column)[2:])
    independent = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], size=(100, 10))
    _, _, low, high = paired_bootstrap(independent)
    assert high - low < 0.5 * (copies[3] - copies[2])


def test_holm_equals_step_down_procedure():
    """It rejects in the order of p while p <= alpha / (tests left); the adjusted p is the smallest such alpha."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        p = rng.random(6) ** 3
        for alpha in np.linspace(0.01, 0.99, 30):
            rejected, order = set(), np.argsort(p)
            for rank, index in enumerate(order):
                if p[index] > alpha / (len(p) - rank):
                    break
                rejected.add(index)
            assert {i for i, adjusted in enumerate(holm(list(p))) if adjusted <= alpha} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []

"""Intervals over seeds and examples: their coverage by simulation, and independent formulas."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from pipeline.evaluation.seed_intervals import half_width, mean_squares, reduce_languages, seed_interval

MEAN = 0.04


def simulate(rng: np.random.Generator, seeds: int, examples: int, seed_sd: float, correlation: float) -> np.ndarray:
    """Draw differences of -1, 0 and 1, a fifth of them not 0, with an effect of the seed and one of the example."""
    shift = MEAN + seed_sd * rng.normal(size=(seeds, 1))
    shared = rng.random((seeds, examples)) < correlation**0.5
    uniform = np.where(shared, rng.random(examples), rng.random((seeds, examples)))
    gained = np.clip((0.2 + shift) / 2, 0, 1)
    lost = np.clip((0.2 - shift) / 2, 0, 1)
    return (uniform < gained) * 1.0 - (uniform > 1 - lost)


def hierarchical_bootstrap(rng: np.random.Generator, values: np.ndarray) -> tuple[float, float]:
    """Resample seeds and examples with replacement: the percentile interval."""
    seeds, examples = values.shape
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=200) / seeds
    columns = rng.multinomial(examples, np.full(examples, 1 / examples), size=200) / examples
    low, high = np.quantile(((rows @ values) * columns).sum(1), [0.025, 0.975])
    return float(low), float(high)


def simulate_intervals(
    rng: np.random.Generator, times: int, seeds: int, examples: int, seed_sd: float, correlation: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean differences and half-widths of simulated tables."""
    tables = [simulate(rng, seeds, examples, seed_sd, correlation) for _ in range(times)]
    columns = zip(*map(mean_squares, tables), strict=True)
    between_seeds, between_examples, rest = (np.array(column) for column in columns)
    half = half_width(between_seeds, between_examples, rest, (seeds, examples), 0.05)
    return np.array([table.mean() for table in tables]), half


@pytest.mark.parametrize(
    # With three seeds or fewer and little spread between them, the interval is wider than it has to be.
    ("seeds", "seed_sd", "most"),
    [(2, 0.0, 99.5), (2, 0.05, 98.0), (3, 0.0, 98.5), (3, 0.03, 98.0), (4, 0.0, 97.7), (4, 0.05, 97), (10, 0.02, 97)],
)
def test_interval_covers_mean(seeds: int, seed_sd: float, most: float) -> None:
    means, half = simulate_intervals(np.random.default_rng(seeds), 2000, seeds, 250, seed_sd, correlation=0.3)
    assert 93.5 <= 100 * np.mean(np.abs(means - MEAN) <= half) <= most


def test_bootstrap_over_few_seeds_covers_too_little() -> None:
    """Why the intervals of several seeds are no bootstrap."""
    rng = np.random.default_rng(7)
    bounds = [hierarchical_bootstrap(rng, simulate(rng, 3, 100, 0.08, 0.3)) for _ in range(200)]
    assert np.mean([low <= MEAN <= high for low, high in bounds]) < 0.9


def test_interval_of_one_seed_is_students_t():
    rng = np.random.default_rng(1)
    values = simulate(rng, 1, 120, 0.0, 0.0)
    expected = ttest_1samp(values[0], 0.0)
    interval = seed_interval(values)
    assert interval.p == pytest.approx(expected.pvalue, rel=1e-6)
    bounds = expected.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((bounds.low, bounds.high))
    assert interval.seed_sd is None and interval.example_sd == pytest.approx(values.std(ddof=1))


def test_interval_is_students_t_over_seeds_if_examples_agree():
    seeds = np.array([0.02, 0.05, -0.01, 0.04])
    values = np.repeat(seeds[:, None], 50, axis=1)
    expected = ttest_1samp(seeds, 0.0)
    interval = seed_interval(values)
    assert interval.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert interval.high - interval.low == pytest.approx(np.diff(expected.confidence_interval(0.95))[0])
    assert interval.seed_sd == pytest.approx(seeds.std(ddof=1))


def test_standard_deviations_of_planted_effects():
    rng = np.random.default_rng(2)
    values = rng.normal(0, 0.5, (40, 1)) + rng.normal(0, 0.8, (1, 3000)) + rng.normal(0, 0.3, (40, 3000))
    interval = seed_interval(values)
    measured = (interval.seed_sd, interval.example_sd, interval.rest_sd)
    assert measured == pytest.approx((0.5, 0.8, 0.3), rel=0.2)
    squares = mean_squares(values)
    total = ((values - values.mean()) ** 2).sum()
    assert 39 * squares.seeds + 2999 * squares.examples + 39 * 2999 * squares.rest == pytest.approx(total)


def test_p_value_agrees_with_interval():
    rng = np.random.default_rng(3)
    for _ in range(60):
        interval = seed_interval(simulate(rng, 3, 60, 0.02, 0.3))
        assert (interval.p < 0.05) == (interval.low > 0 or interval.high < 0)
    assert seed_interval(np.zeros((2, 5))).p == 1


def test_p_value_of_equal_differences_depends_on_their_number():
    """All intervals have width 0, but five examples or two seeds show little."""
    assert seed_interval(np.ones((1, 5))).p == 2**-4 and seed_interval(np.full((2, 5), 0.1)).p == 0.5


def test_reduce_languages_equals_resampled_mean():
    """The spread of the values is that of the mean over languages when groups are resampled, as by a jackknife."""
    rng = np.random.default_rng(4)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=(2, 150, 3))
    complete = reduce_languages(differences, [0, 2])
    assert complete == pytest.approx(differences[:, :, [0, 2]].mean(2))
    absent = rng.random((150, 3)) < [0.0, 0.3, 0.6]
    differences[:, absent] = np.nan
    values = reduce_languages(differences, [0, 1, 2])
    assert values.mean(1) == pytest.approx(np.nanmean(differences, 1).mean(1))
    without = np.array([np.nanmean(np.delete(differences[0], g, 0), 0).mean() for g in range(150)])
    jackknife = (149 / 150 * ((without - without.mean()) ** 2).sum()) ** 0.5
    assert values[0].std(ddof=1) / 150**0.5 == pytest.approx(jackknife, rel=0.02)

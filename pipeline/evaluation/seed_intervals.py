"""Confidence intervals of a difference that was measured with several seeds on the same examples.

Both the seeds and the examples are samples: other seeds and other examples would give another difference. With the
difference of seed s on example g as a sum of independent effects, d[s, g] = mean + seed[s] + example[g] + rest[s, g],
the variance of the mean is var(seed) / S + var(example) / G + var(rest) / (S G). This is the model of readers and cases
in diagnostic radiology (Dorfman, Berbaum and Metz 1992), with seeds for readers and examples for cases.

The half-width combines that of Student's t over the seeds' means with that of the choice of examples, as the root of
the sum of their squares (Howe 1974, "Approximate confidence limits on the mean of X + Y").

Shape letters: S seeds, G example groups (one question in all its languages), L languages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.common.optional_imports import import_optional


class SeedInterval(NamedTuple):
    """Mean difference of two models with its uncertainty.

    Attributes:
        difference: mean over seeds and examples.
        low: lower bound of the 95 % confidence interval.
        high: upper bound of that interval.
        p: two-sided p-value of a difference of 0.
        seed_sd: estimated standard deviation between seeds, beyond the choice of examples. None with a single seed.
        example_sd: estimated standard deviation between examples, averaged over infinitely many seeds. With a single
            seed, the standard deviation between examples. None with a single example.
        rest_sd: estimated standard deviation of what varies with both. None with a single seed.
    """

    difference: float
    low: float
    high: float
    p: float
    seed_sd: float | None
    example_sd: float | None
    rest_sd: float | None


class MeanSquares(NamedTuple):
    """Mean squares of a two-way table of S seeds and G examples with one value per cell."""

    seeds: float
    examples: float
    rest: float


def reduce_languages(differences: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Reduce differences to one value per seed and group, whose mean over groups is the mean over languages.

    A group may lack languages. Then the mean over languages of the mean differences is not the mean over groups of any
    average within the group, so the values are its influence function: their mean is exact, and their spread over
    groups is that of the mean to first order. If every group has every language, they are the averages over languages.

    Args:
        differences: [S, G, L], nan if a group has no example in a language. A group has the same languages in all
            seeds.
        columns: indices of the languages to average, each present in at least one group.

    Returns:
        [S, G'] values of the G' groups that have at least one of the languages.
    """
    chosen = differences[:, :, list(columns)]
    chosen = chosen[:, ~np.isnan(chosen[0]).all(1)]
    present = ~np.isnan(chosen)
    counts = present[0].sum(0)  # [L]
    means = np.nan_to_num(chosen).sum(1) / counts  # [S, L]
    deviations = np.where(present, chosen - means[:, None], 0) / counts
    return means.mean(1)[:, None] + chosen.shape[1] * deviations.sum(2) / len(columns)


def mean_squares(values: np.ndarray) -> MeanSquares:
    """Return the mean squares of [S, G] values, for S > 1 and G > 1."""
    seeds, examples = values.shape
    mean, by_seed, by_example = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_example + mean
    return MeanSquares(
        float(examples * ((by_seed - mean) ** 2).sum() / (seeds - 1)),
        float(seeds * ((by_example - mean) ** 2).sum() / (examples - 1)),
        float((rest**2).sum() / ((seeds - 1) * (examples - 1))),
    )


def half_width(
    between_seeds: np.ndarray | float,
    between_examples: np.ndarray | float,
    rest: np.ndarray | float,
    shape: tuple[int, int],
    alpha: float,
) -> np.ndarray:
    """Return the half-width of the interval of the mean at confidence 1 - `alpha`, elementwise.

    Args:
        between_seeds: mean square of seeds, 0 with a single seed.
        between_examples: mean square of examples.
        rest: mean square of the rest, 0 with a single seed.
        shape: (S, G).
        alpha: probability that the interval misses the mean.
    """
    student = import_optional("scipy.stats").t
    seeds, examples = shape
    by_seed = student.isf(alpha / 2, seeds - 1) ** 2 * np.asarray(between_seeds) if seeds > 1 else 0.0
    by_example = student.isf(alpha / 2, examples - 1) ** 2 * np.maximum(np.asarray(between_examples) - rest, 0)
    return np.sqrt((by_seed + by_example) / (seeds * examples))


def seed_interval(values: np.ndarray) -> SeedInterval:
    """Compute the mean difference with a 95 % interval and a p-value.

    With several seeds, they cover the choice of seeds and of examples. With one seed, they cover the choice of
    examples only, by Student's t over examples. The interval of a single example is [-1, 1].

    Args:
        values: [S, G] differences of one seed on one example group.
    """
    seeds, examples = values.shape
    difference = float(values.mean())
    if examples < 2:
        return SeedInterval(difference, -1.0, 1.0, 1.0, None, None, None)
    seed_sd = rest_sd = None
    if seeds == 1:
        squares = MeanSquares(0.0, float(values.var(ddof=1)), 0.0)
    else:
        squares = mean_squares(values)
        seed_sd = (max(squares.seeds - squares.rest, 0.0) / examples) ** 0.5
        rest_sd = squares.rest**0.5
    example_sd = (max(squares.examples - squares.rest, 0.0) / seeds) ** 0.5
    half = float(half_width(*squares, values.shape, 0.05))
    p = _p_value(difference, squares, values.shape)
    return SeedInterval(difference, difference - half, difference + half, p, seed_sd, example_sd, rest_sd)


def _p_value(difference: float, squares: MeanSquares, shape: tuple[int, int]) -> float:
    """Return the smallest alpha whose interval excludes 0.

    If all differences are equal, all intervals have width 0. Then it is the p-value of a sign test, which depends on
    their number.
    """

    def excess(log_alpha: float) -> float:
        return float(half_width(*squares, shape, float(np.exp(log_alpha)))) - abs(difference)

    smallest = -300.0  # logarithm of the smallest p-value that is searched
    if abs(difference) < 1e-12:
        return 1.0
    if excess(smallest) < 0:  # all values are equal, or nearly
        return float(2.0 ** (1 - (min(shape) if shape[0] > 1 else shape[1])))
    return float(np.exp(import_optional("scipy.optimize").brentq(excess, smallest, 0.0)))

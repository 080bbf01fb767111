"""Confidence intervals and tests for accuracies: Wilson's interval, McNemar's and Holm's tests, the bootstrap.

Shape letters: G example groups (one question in all its languages), L languages.
"""

from collections.abc import Sequence
from math import comb
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
MAX_ELEMENTS = 10_000_000  # maximum number of elements drawn at once; bounds the memory of the bootstrap


def wilson_interval(correct: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (Wilson 1927) of the proportion `correct` / `n`, for `n` > 0.

    Unlike the normal approximation, it has correct coverage near 0 and 1 and for small `n`.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    proportion = correct / n
    center = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (proportion * (1 - proportion) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947, binomial form).

    Under the null hypothesis, each of the `gained` + `lost` discordant pairs is gained with probability 1/2.
    """
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Compute 95 % percentile intervals (Efron 1979) of the mean difference of two models.

    Whole example groups are resampled, because the translations of a question are not independent observations.

    Args:
        differences: [G, L] with values -1, 0 or 1, or nan if a group has no example in a language.
        seed: random seed of the resampling.

    Returns:
        The lower and upper bounds per language, [L] each, and the lower and upper bound of the mean over languages.
    """
    present = (~np.isnan(differences)).astype(np.float64)
    values = np.nan_to_num(differences)
    generator, size = np.random.default_rng(seed), len(differences)
    resampled = []
    chunk = max(1, MAX_ELEMENTS // size)
    for start in range(0, RESAMPLES, chunk):
        counts = generator.multinomial(size, np.full(size, 1 / size), size=min(chunk, RESAMPLES - start))
        resampled.append((counts @ values) / np.maximum(counts @ present, 1))
    means = np.concatenate(resampled)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    mean_low, mean_high = np.quantile(means.mean(1), [0.025, 0.975])
    return low, high, float(mean_low), float(mean_high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the adjusted p-values of Holm's method (Holm 1979), which control the family-wise error rate."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted

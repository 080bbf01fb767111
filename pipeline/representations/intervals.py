"""Bootstrap intervals over example groups, from per-example values.

Shape letters: G example groups.

Each metric gives one value per example group, whose mean is the metric and whose spread is that of the metric: the
metric plus the centered jackknife influence of the group, (G - 1) (metric - metric without the group), as in Efron and
Tibshirani 1993, chapters 10 and 11. For a mean of per-example terms these are the terms. Resampling the values avoids
that copies of an example, which a resample of the data contains, are each other's nearest neighbors.
"""

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def influence_values(metric: float, without: np.ndarray) -> np.ndarray:
    """Return the [G] per-example values of a metric, given the [G] metric without each example group."""
    influences = (len(without) - 1) * (metric - without)
    return metric + influences - influences.mean()


class Bootstrap:
    """Percentile intervals of means over example groups.

    The resamples are the same for all metrics of one G, and so for two runs on the same examples: the difference of
    their per-example values gives the paired interval of the difference.
    """

    def __init__(self, groups: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
        # Resampling G of G values gives the standard deviation of a mean with divisor G instead of G - 1.
        self._weights = (counts / groups - 1 / groups) * np.sqrt(groups / max(1, groups - 1))

    def interval(self, values: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> tuple[float, float]:
        """Return the 95 % interval of the mean of [G] values, clipped to the range of the metric."""
        deviations = self._weights @ values
        quantiles = np.quantile(deviations, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        low, high = np.clip(values.mean() + quantiles, *bounds)
        return float(low), float(high)

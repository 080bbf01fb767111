"""Statistics of an experiment: values per seed, differences paired by seed, Holm's correction, number of seeds needed.

`PRIMARY` is the measure that a plan's primary contrasts test. All other tests are secondary: in every world, every
variant against plain fine-tuning, by each of the measures of `TESTED`. Holm's correction is applied to both sets
separately. Intervals are not corrected.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from pipeline.common.optional_imports import import_optional
from pipeline.experiments.plan import BASELINE, Contrast, ExperimentPlan

PRIMARY = "low_unseen"
TESTED = ("low_unseen", "low_seen", "low", "mid", "pivot", "confusion")

CSV_COLUMNS = ["seed", "world", "arm", "measure", "value"]

ModelMetrics = dict[str, Any]  # metrics of one model, as written by `Study`
Results = dict[tuple[str, str], dict[int, ModelMetrics]]  # by variant and world, then by seed


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A paired t-test of one measure.

    Attributes:
        contrast: variant, baseline and world.
        measure: name of the measure.
        seeds: number of seeds that have both models.
        interval: mean difference, and its 95 % interval without correction.
        p: two-sided p-value; NaN for fewer than two seeds.
        p_holm: p-value after Holm's correction over all primary or all secondary tests.
        primary: whether the plan names the contrast as primary.
    """

    contrast: Contrast
    measure: str
    seeds: int
    interval: Interval
    p: float
    p_holm: float
    primary: bool


def read_results(output: Path) -> Results:
    """Read the metrics of all models in an output directory."""
    results: Results = {}
    for path in sorted(output.glob("seed-*/*/*.json")):
        if not path.parent.name.startswith("base-"):  # a base model has JSON files of transformers
            metrics = json.loads(path.read_text(encoding="utf-8"))
            results.setdefault((metrics["arm"], metrics["world"]), {})[metrics["seed"]] = metrics
    return results


def values_csv(results: Results) -> str:
    """Format all values as CSV: one line per seed, world, variant (`arm`) and measure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for (variant, world), models in sorted(results.items()):
        for seed, metrics in sorted(models.items()):
            for measure, value in sorted(metrics.items()):
                if isinstance(value, float):
                    writer.writerow([seed, world, variant, measure, f"{value:.8g}"])
    return file.getvalue()


def interval(values: Sequence[float]) -> Interval:
    """Compute the mean and its confidence interval. The bounds are NaN for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = import_optional("scipy.stats").t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def p_value(values: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's t-test of a mean of 0; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    error = stdev(values) / math.sqrt(len(values))
    if error == 0:
        return 0.0 if fmean(values) else 1.0
    return float(2 * import_optional("scipy.stats").t.sf(abs(fmean(values)) / error, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's method. NaNs are ignored and stay NaN."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def differences(results: Results, contrast: Contrast, measure: str) -> list[float]:
    """Return the differences of a measure between both variants, for the seeds that have both."""
    return list(differences_by_seed(results, contrast, measure).values())


def differences_by_seed(results: Results, contrast: Contrast, measure: str) -> dict[int, float]:
    """Return `differences` by seed, in ascending order."""
    models = results.get((contrast.variant, contrast.world), {})
    baseline = results.get((contrast.baseline, contrast.world), {})
    return {seed: models[seed][measure] - baseline[seed][measure] for seed in sorted(models.keys() & baseline.keys())}


def run_comparisons(plan: ExperimentPlan, results: Results) -> list[Comparison]:
    """Run all tests of a plan for which there are results, primary ones first."""
    primary = [(contrast, PRIMARY) for contrast in plan.primary]
    secondary = [
        (contrast, measure)
        for world in plan.worlds
        for name in plan.variants_of(world)
        for measure in TESTED
        if name != BASELINE
        and not ((contrast := Contrast(name, BASELINE, world)) in plan.primary and measure == PRIMARY)
    ]
    comparisons = []
    for kind in (primary, secondary):
        pairs = [(c, m, values) for c, m in kind if (values := differences(results, c, m))]
        p_values = [p_value(values) for *_, values in pairs]
        for (contrast, measure, values), p, p_holm in zip(pairs, p_values, holm(p_values), strict=True):
            comparisons.append(Comparison(contrast, measure, len(values), interval(values), p, p_holm, kind is primary))
    return comparisons


def detectable_difference(comparison: Comparison, power: float = 0.8) -> float:
    """Return the mean difference that the test finds with the given power, if its seeds vary as they do."""
    if comparison.seeds < 2:
        return math.nan
    quantile, freedom = import_optional("scipy.stats").t.ppf, comparison.seeds - 1
    half = comparison.interval.high - comparison.interval.mean
    return float(half * (1 + quantile(power, freedom) / quantile(0.975, freedom)))


def seeds_needed(deviation: float, effect: float = 0.05, power: float = 0.8) -> int:
    """Return the number of seeds for which a paired t-test at 5 % finds a mean difference with the given power.

    Uses n >= ((t_{0.975} + t_{power}) * deviation / effect)^2, with the quantiles of Student's t at n - 1 degrees of
    freedom.

    Args:
        deviation: standard deviation of the differences over seeds.
        effect: mean difference to find.
        power: probability to find it.
    """
    quantile = import_optional("scipy.stats").t.ppf
    n = 3
    while n < 1000 and n < ((quantile(0.975, n - 1) + quantile(power, n - 1)) * deviation / effect) ** 2:
        n += 1
    return n

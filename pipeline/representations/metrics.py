"""All metrics of the representations of a model, with intervals and per-example values.

Shape letters: L languages, G example groups, d size of a representation.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.representations.intervals import Bootstrap
from pipeline.representations.separability import principal_components, separability
from pipeline.representations.similarity import Metric, similarity_metrics, standardize
from pipeline.representations.variance import variance_split

StateMetrics = dict[str, Any]
FRACTIONS = ("retrieval", "xsim_error")  # metrics from 0 to 1, whose intervals are clipped to that range
DIGITS = 6  # significant digits of the per-example values in the results


def representation_metrics(
    states: dict[str, np.ndarray], languages: list[str], pivot: str, scattered: set[str], separated: bool = True
) -> dict[str, StateMetrics]:
    """Compute all metrics of each representation.

    Args:
        states: [L * G, d] by name, ordered by language and with the G questions in the same order.
        languages: the language codes.
        pivot: language of the `with_pivot` means.
        scattered: names of the representations to also compute scatter plot coordinates for.
        separated: whether to compute the separability of languages, which takes the most time.

    Returns:
        For each name: `similarity`, the mean over all pairs of languages (`all`) and over pairs with the pivot
        (`with_pivot`), and `similarity_zscored`, the same of the states standardized by dimension; `variance` and
        `variance_zscored`; `separability`; `pairs`, the similarity metrics of each pair of languages; `examples`, the
        per-example values of all of these that have an interval; and `scatter` if requested.

    Raises:
        UserError: a state is not finite.
    """
    metrics = {}
    for name, points in states.items():
        if not np.isfinite(points).all():
            raise UserError(f"{name}: not finite; the model's states overflow; use a different --dtype")
        bootstrap = Bootstrap(len(points) // len(languages))
        metrics[name] = _measure(points, languages, pivot, bootstrap)
        zscored = _measure(standardize(points), languages, pivot, bootstrap)
        for key in ("similarity", "variance"):
            metrics[name][f"{key}_zscored"] = zscored[key]
            metrics[name]["examples"][f"{key}_zscored"] = zscored["examples"][key]
        if separated:
            groups = np.tile(np.arange(len(points) // len(languages)), len(languages))
            point_languages = np.repeat(languages, len(points) // len(languages))
            metrics[name]["separability"] = separability(points, point_languages, groups)
        if name in scattered:
            metrics[name]["scatter"] = _scatter(points, languages)
    return metrics


def _measure(points: np.ndarray, languages: list[str], pivot: str, bootstrap: Bootstrap) -> StateMetrics:
    per_language = dict(zip(languages, np.split(points, len(languages)), strict=True))
    pairs = {(a, b): similarity_metrics(per_language[a], per_language[b]) for a, b in combinations(languages, 2)}
    similarity, examples = _mean_metrics(list(pairs.values()), bootstrap)
    with_pivot, _ = _mean_metrics([metrics for pair, metrics in pairs.items() if pivot in pair], bootstrap)
    split = variance_split(np.stack(list(per_language.values())))
    return {
        "similarity": {"all": similarity, "with_pivot": with_pivot},
        "variance": {
            part: {"value": share.value, "interval": bootstrap.interval(share.examples, (0, 1))}
            for part, share in split.items()
        },
        "pairs": _nested_values(pairs),
        "examples": {
            "similarity": examples,
            "variance": {name: _rounded(part.examples) for name, part in split.items()},
        },
    }


def _mean_metrics(
    pairs: Sequence[dict[str, Metric]], bootstrap: Bootstrap
) -> tuple[dict[str, dict[str, Any]] | None, dict[str, list[float]]]:
    """Average metrics over pairs of languages.

    Returns:
        (means, examples). `means`: for each metric its value, its chance level and, if it has values per example, the
        interval; None if there are no pairs. `examples`: the means per example of the metrics that have them.
    """
    if not pairs:
        return None, {}
    means: dict[str, dict[str, Any]] = {}
    examples = {}
    for name in pairs[0]:
        means[name] = {
            "value": fmean(pair[name].value for pair in pairs),
            "floor": fmean(pair[name].floor for pair in pairs),
        }
        values = [values for pair in pairs if (values := pair[name].examples) is not None]
        if values:
            mean = np.mean(values, axis=0)
            means[name]["interval"] = bootstrap.interval(mean, (0, 1) if name in FRACTIONS else (-np.inf, np.inf))
            examples[name] = _rounded(mean)
    return means, examples


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _nested_values(pairs: dict[tuple[str, str], dict[str, Metric]]) -> dict[str, dict[str, dict[str, float]]]:
    nested: dict[str, dict[str, dict[str, float]]] = {}
    for (first, second), metrics in pairs.items():
        nested.setdefault(first, {})[second] = {name: metric.value for name, metric in metrics.items()}
    return nested


def _scatter(points: np.ndarray, languages: list[str]) -> dict[str, Any]:
    coordinates, variance = principal_components(points)
    rounded = coordinates / np.abs(coordinates).max(initial=1e-30)
    parts = np.split(rounded.round(4), len(languages))
    return {"variance": variance, "points": {lang: part.tolist() for lang, part in zip(languages, parts, strict=True)}}

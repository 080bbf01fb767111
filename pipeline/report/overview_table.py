"""Table of the main metrics of each run."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from pipeline.evaluation.accuracy import count_unfinished, percent
from pipeline.report.runs import RunResults, series

ABSENT = "–"

MetricReader = Callable[[RunResults], str | None]


def overview_rows(runs: Sequence[RunResults]) -> list[list[str]]:
    """Return a row for each metric that at least one run has, with the name of the metric and a cell for each run."""
    rows = []
    for name, read in OVERVIEW_METRICS.items():
        values = [read(run) for run in runs]
        if any(value is not None for value in values):
            rows.append([name, *(value or ABSENT for value in values)])
    return rows


def _from_evaluation(select: Callable[[dict[str, Any]], float | None]) -> MetricReader:
    def read(run: RunResults) -> str | None:
        try:
            fraction = select(run.evaluation or {})
        except (KeyError, TypeError):  # the evaluation lacks this metric
            return None
        return None if fraction is None else percent(fraction)

    return read


def _from_representations(group: str, metric: str, state: str = "final") -> MetricReader:
    def read(run: RunResults) -> str | None:
        if not run.representations:
            return None
        values = run.representations["representations"][state][group]
        return f"{values['all'][metric]['value']:.3f}" if group == "similarity" else f"{values[metric]:.3f}"

    return read


def _soft_token_cosine(run: RunResults) -> str | None:
    if not run.representations:
        return None
    cosine = run.representations["representations"]["soft_tokens"]["similarity"]["all"]["cosine"]
    return f"{cosine['value']:.3f} ({cosine['floor']:.3f})"


def _from_metrics(key: str, combine: Callable[[list[float]], float], format_spec: str) -> MetricReader:
    def read(run: RunResults) -> str | None:
        values = series(run.metrics, key)[1]
        return f"{combine(values):{format_spec}}" if values else None

    return read


def _last(values: list[float]) -> float:
    return values[-1]


def mean_in_language(evaluation: dict[str, Any], metric: str = "share") -> float | None:
    """Return the mean over languages of a metric of the outputs' languages, or None if it was not measured.

    Args:
        evaluation: content of evaluation.json.
        metric: see `language_metrics`; default: the fraction of outputs in the language of the question.
    """
    languages = (evaluation.get("output_languages") or {}).values()
    fractions = [language[metric] for language in languages if language.get(metric) is not None]
    return sum(fractions) / len(fractions) if fractions else None


def _unfinished(evaluation: dict[str, Any]) -> float | None:
    if "languages" not in evaluation:
        return None
    unfinished, total = count_unfinished(evaluation)
    return unfinished / total


def _evaluated_step(run: RunResults) -> str | None:
    return None if run.evaluated_step is None else f"{run.evaluated_step:,}"


# The rows of the table: the name of a metric, and a function that reads it from a run.
OVERVIEW_METRICS: dict[str, MetricReader] = {
    "unfinished responses, %": _from_evaluation(_unfinished),
    "accuracy, mean of languages, %": _from_evaluation(lambda result: result["macro"]["accuracy"]),
    "same answer as the pivot, %": _from_evaluation(lambda result: result["macro"]["consistency_with_pivot"]),
    "same answer, any two languages, %": _from_evaluation(lambda result: result["agreement"]["mean_pairwise"]),
    "same wrong answer, any two languages, %": _from_evaluation(lambda result: result["agreement"]["wrong"]["share"]),
    "answers in the language of the question, %": _from_evaluation(mean_in_language),
    "lines in the language of the question (LPR), %": _from_evaluation(
        lambda result: mean_in_language(result, "line_pass_rate")
    ),
    "words in another script, %": _from_evaluation(lambda result: mean_in_language(result, "other_script_words")),
    "cosine of pairs, soft tokens (of shuffled pairs)": _soft_token_cosine,
    "centered cosine of pairs, soft tokens": _from_representations("similarity", "centred_cosine", "soft_tokens"),
    "centered cosine of pairs, final state": _from_representations("similarity", "centred_cosine"),
    "retrieval P@1, final state": _from_representations("similarity", "retrieval"),
    "silhouette by language, final state": _from_representations("separability", "silhouette"),
    "cross-entropy, last step": _from_metrics("ce_loss", _last, ".4f"),
    "alignment cosine, last step": _from_metrics("align_cos", _last, ".4f"),
    "step of the evaluated model": _evaluated_step,
    "steps trained": _from_metrics("step", max, ",.0f"),
    "tokens": _from_metrics("num_tokens", max, ",.0f"),
    "tokens per second, median": _from_metrics("tokens_per_second", median, ",.0f"),
    "model FLOPs utilization, median": _from_metrics("mfu", median, ".2%"),
    "peak memory per rank, GB": _from_metrics("peak_memory_gb", max, ".2f"),
}

"""The main figures of a run, one line each."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from pipeline.evaluation.consistency import percent
from pipeline.report.runs import Run, series

ABSENT = "–"


def glance(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each quantity that any run has: its name, then a cell for each run."""
    rows = []
    for name, read in GLANCE.items():
        values = [read(run) for run in runs]
        if any(value is not None for value in values):
            rows.append([name, *(value or ABSENT for value in values)])
    return rows


def _of_evaluation(read: Callable[[dict[str, Any]], float | None]) -> Callable[[Run], str | None]:
    def text(run: Run) -> str | None:
        try:
            share = read(run.evaluation or {})
        except (KeyError, TypeError):  # an evaluation without these figures
            return None
        return None if share is None else percent(share)

    return text


def _of_states(group: str, metric: str) -> Callable[[Run], str | None]:
    def text(run: Run) -> str | None:
        if not run.representations:
            return None
        found = run.representations["representations"]["final"][group]
        return f"{found['all'][metric]['value']:.3f}" if group == "similarity" else f"{found[metric]:.3f}"

    return text


def _of_metrics(key: str, combine: Callable[[list[float]], float], form: str) -> Callable[[Run], str | None]:
    def text(run: Run) -> str | None:
        values = series(run.metrics, key)[1]
        return f"{combine(values):{form}}" if values else None

    return text


def _last(values: list[float]) -> float:
    return values[-1]


def _in_language(evaluation: dict[str, Any]) -> float | None:
    shares = [one["share"] for one in evaluation["output_languages"].values() if one["share"] is not None]
    return sum(shares) / len(shares) if shares else None


# What is read of each run for its column.
GLANCE: dict[str, Callable[[Run], str | None]] = {
    "accuracy, mean of languages, %": _of_evaluation(lambda found: found["macro"]["accuracy"]),
    "same answer as the pivot, %": _of_evaluation(lambda found: found["macro"]["consistency_with_pivot"]),
    "same answer, any two languages, %": _of_evaluation(lambda found: found["agreement"]["mean_pairwise"]),
    "answers in the language asked, %": _of_evaluation(_in_language),
    "centred cosine of pairs, final state": _of_states("similarity", "centred_cosine"),
    "retrieval P@1, final state": _of_states("similarity", "retrieval"),
    "silhouette by language, final state": _of_states("separability", "silhouette"),
    "cross-entropy, last step": _of_metrics("ce_loss", _last, ".4f"),
    "alignment cosine, last step": _of_metrics("align_cos", _last, ".4f"),
    "steps": _of_metrics("step", max, ",.0f"),
    "tokens": _of_metrics("num_tokens", max, ",.0f"),
    "tokens per second, median": _of_metrics("tokens_per_second", median, ",.0f"),
    "model FLOP utilisation, median": _of_metrics("mfu", median, ".2%"),
    "peak memory of a rank, GB": _of_metrics("peak_memory_gb", max, ".2f"),
}

"""Differences between two runs in how similar the soft tokens of translations are."""

from collections.abc import Sequence
from typing import Any

from pipeline.compare import verdict
from pipeline.report.runs import RunResults
from pipeline.representations.baseline import paired_difference
from pipeline.representations.intervals import Bootstrap

METRICS = {"cosine": "cosine", "centred_cosine": "centered cosine", "retrieval": "retrieval P@1"}


def soft_token_differences(baseline: RunResults, run: RunResults) -> dict[str, dict[str, Any]]:
    """Compare the soft-token summaries of two runs, paired by problem.

    Returns:
        By metric, `value` (run minus baseline) and its `interval`. Empty if the runs were not measured on the same
        problems.
    """
    first, second = baseline.representations, run.representations
    if not first or not second or any(first[key] != second[key] for key in ("position", "languages", "pair_ids")):
        return {}
    before, after = (result["representations"]["soft_tokens"]["examples"]["similarity"] for result in (first, second))
    bootstrap = Bootstrap(first["problems"])
    return {metric: paired_difference(after[metric], before[metric], bootstrap) for metric in METRICS}


def in_words(difference: dict[str, Any]) -> str:
    """Format a difference with its interval and what that means."""
    low, high = difference["interval"]
    return f"{difference['value']:+.3f} ({low:+.3f} to {high:+.3f}): {verdict({'low': low, 'high': high})}"


def similarity_rows(runs: Sequence[RunResults]) -> list[list[str]]:
    """Return a row for each metric, with a cell for each run after the first; empty if no run can be compared."""
    compared = [soft_token_differences(runs[0], run) for run in runs[1:]]
    if not any(compared):
        return []
    return [
        [name, *(in_words(differences[metric]) if differences else "–" for differences in compared)]
        for metric, name in METRICS.items()
    ]

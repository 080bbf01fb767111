"""Main table of several runs: accuracy per language, and the difference of each run from the baseline."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from pipeline.compare import MEAN
from pipeline.evaluation.accuracy import count_unfinished, in_language_cell, percent, unfinished_by_language
from pipeline.report.overview_table import ABSENT, mean_in_language
from pipeline.report.runs import RunResults


def main_table(
    runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]], order: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows: the mean, that of the primary languages if there are any, and each language.

    Args:
        runs: evaluated runs; the first one is the baseline.
        comparisons: comparison of each run with the baseline, by run name.
        order: the languages, in the order of their rows.
    """
    header = ["language", "n", *(run.name for run in runs)]
    for name in comparisons:
        header += [f"{name} − {runs[0].name}", "Holm p"]
    names = ", ".join(run.name for run in runs)
    header += [f"unfinished %: {names}", f"in the language %: {names}"]
    rows = [_mean_row(runs, comparisons)]
    measures = [comparison["primary"] for comparison in comparisons.values()]
    if measures and measures[0]["measure"] != MEAN:
        rows.append(_primary_row(runs, measures))
    return header, rows + [_language_row(runs, comparisons, lang) for lang in order]


def _mean_row(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> list[str]:
    evaluations = [run.evaluation or {} for run in runs]
    counts = [count_unfinished(evaluation) for evaluation in evaluations]
    return [
        "mean of languages",
        _without_repeats(str(sum(score["n"] for score in _scores(run).values())) for run in runs),
        *(percent(evaluation["macro"]["accuracy"]) for evaluation in evaluations),
        *_mean_differences([comparison["mean"] for comparison in comparisons.values()]),
        ", ".join(percent(unfinished / total) for unfinished, total in counts),
        ", ".join(percent(mean_in_language(evaluation)) for evaluation in evaluations),
    ]


def _primary_row(runs: Sequence[RunResults], measures: Sequence[dict[str, Any]]) -> list[str]:
    languages = measures[0]["languages"]

    def per_run(read: Callable[[dict[str, Any], str], float | None]) -> list[str]:
        values = [[read(run.evaluation or {}, lang) for lang in languages] for run in runs]
        return [percent(fmean(present) if (present := [v for v in row if v is not None]) else None) for row in values]

    return [
        f"mean of {measures[0]['measure']} (primary)",
        _without_repeats(str(sum(_scores(run).get(lang, {}).get("n", 0) for lang in languages)) for run in runs),
        *per_run(lambda evaluation, lang: evaluation["languages"].get(lang, {}).get("accuracy")),
        *_mean_differences(measures),
        ", ".join(per_run(_unfinished)),
        ", ".join(per_run(_in_language)),
    ]


def _language_row(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]], lang: str) -> list[str]:
    scores = [_scores(run).get(lang) for run in runs]
    cells = [lang, _without_repeats(str(score["n"]) for score in scores if score)]
    cells += [
        f"{percent(score['accuracy'])} ({percent(score['low'])} to {percent(score['high'])})" if score else ABSENT
        for score in scores
    ]
    for comparison in comparisons.values():
        entry = comparison["languages"].get(lang)
        cells += [difference_cell(entry), f"{entry['p_holm']:.3g}"] if entry else [ABSENT, ABSENT]
    cells.append(", ".join(percent(_unfinished(run.evaluation or {}, lang)) for run in runs))
    return [*cells, ", ".join(in_language_cell(run.evaluation or {}, lang) for run in runs)]


def difference_cell(entry: dict[str, float]) -> str:
    """Format a difference with its interval, in percentage points."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * entry[key] for key in ("difference", "low", "high")))


def _mean_differences(entries: Sequence[dict[str, float]]) -> list[str]:
    return [cell for entry in entries for cell in (difference_cell(entry), f"p = {entry['p']:.3g}")]


def _scores(run: RunResults) -> dict[str, Any]:
    scores: dict[str, Any] = (run.evaluation or {})["languages"]
    return scores


def _unfinished(evaluation: dict[str, Any], lang: str) -> float | None:
    unfinished, responses = unfinished_by_language(evaluation).get(lang, (0, 0))
    return unfinished / responses if responses else None


def _in_language(evaluation: dict[str, Any], lang: str) -> float | None:
    fraction: float | None = (evaluation.get("output_languages") or {}).get(lang, {}).get("share")
    return fraction


def _without_repeats(cells: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(cells))

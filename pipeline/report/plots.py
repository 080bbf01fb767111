"""Plots of a report: training curves, accuracy, differences and agreement."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pipeline.common.plotting import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    NAVY,
    ORANGE,
    RUN_COLORS,
    add_axes,
    heat_map,
    new_figure,
    title,
)
from pipeline.evaluation.consistency import agreement_matrix
from pipeline.report.runs import MetricHistory, RunResults, languages_of, series

CURVES = {  # training metric: heading, validation metric, color for a single run
    "ce_loss": ("Cross-entropy", "eval_ce", BLUE),
    "align_loss": ("Alignment loss", "eval_alignment", ORANGE),
    "align_cos": ("Alignment cosine", "eval_align_cos", GREEN),
}


MAX_LABEL_CHARACTERS = 60  # more would overlap below an axis


def plot_overview(runs: Sequence[RunResults], primary: Sequence[str] = ()) -> Figure:
    """Plot the recorded training curves in the upper row and the accuracy per language below."""
    recorded = _recorded(runs)
    evaluated = [run for run in runs if run.evaluation]
    rows, columns = max(1, bool(recorded) + bool(evaluated)), max(1, len(recorded))
    figure = new_figure(max(9.2, 4.6 * columns), 3.9 * rows)
    grid = figure.add_gridspec(rows, columns)
    for column, key in enumerate(recorded):
        _draw_curve(add_axes(figure, grid[0, column]), runs, key)
    if evaluated:
        _draw_accuracy(add_axes(figure, grid[-1, :]), runs, primary)
    return figure


def plot_curves(runs: Sequence[RunResults]) -> Figure | None:
    """Plot the training curves. Return None if no run has metrics."""
    recorded = _recorded(runs)
    if not recorded:
        return None
    figure = new_figure(4.6 * max(2, len(recorded)), 3.9)
    grid = figure.add_gridspec(1, len(recorded))
    for column, key in enumerate(recorded):
        _draw_curve(add_axes(figure, grid[0, column]), runs, key)
    return figure


def plot_accuracy(runs: Sequence[RunResults], primary: Sequence[str] = ()) -> Figure | None:
    """Plot the accuracy per language, the primary languages first. Return None if no run was evaluated."""
    if not any(run.evaluation for run in runs):
        return None
    figure = new_figure(13.8, 4.2)
    _draw_accuracy(add_axes(figure, figure.add_gridspec(1, 1)[0]), runs, primary)
    return figure


def _recorded(runs: Sequence[RunResults]) -> list[str]:
    return [key for key in CURVES if any(series(run.metrics, key)[1] for run in runs)]


def smooth(values: list[float], window: int) -> list[float]:
    """Return the centered moving average over `window` values, or fewer at the ends."""
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def run_color(runs: Sequence[RunResults], run: RunResults) -> str:
    """Return the color of a run in all plots of a report."""
    return RUN_COLORS[list(runs).index(run) % len(RUN_COLORS)]


def _draw_curve(axes: Axes, runs: Sequence[RunResults], key: str) -> None:
    """Draw a metric by step in training and validation. For a single run, also draw each language's cross-entropy."""
    heading, eval_key, single_color = CURVES[key]
    if len(runs) == 1 and key == "ce_loss":
        _draw_languages(axes, runs[0].metrics)
    for run in runs:
        name, color = (run.name, run_color(runs, run)) if len(runs) > 1 else ("all languages", single_color)
        _draw_smooth(axes, run.metrics, key, color, name)
        if (points := series(run.validations, eval_key))[1]:
            axes.plot(*points, "o--", color=color, markersize=4, label=f"{name}, validation", zorder=4)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    title(axes, heading)


def _draw_smooth(axes: Axes, metrics: MetricHistory, key: str, color: str, name: str) -> None:
    """Draw a metric. If there are many values, draw a smoothed line over the raw values."""
    steps, values = series(metrics, key)
    if not values:
        return
    window = len(values) // 25
    if window >= 2:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, smooth(values, window), color=color, linewidth=1.9, label=name, marker=marker, zorder=3)


def _draw_languages(axes: Axes, metrics: MetricHistory) -> None:
    languages = [lang for lang in languages_of(metrics) if series(metrics, f"ce_loss_{lang}")[1]]
    for lang in languages:
        steps, values = series(metrics, f"ce_loss_{lang}")
        axes.plot(steps, smooth(values, len(values) // 25), color=GREY, linewidth=0.8, alpha=0.7)
    if languages:
        axes.plot([], [], color=GREY, linewidth=0.8, label=f"each of {len(languages)} languages")


def ordered_languages(runs: Sequence[RunResults], primary: Sequence[str] = ()) -> tuple[list[str], str]:
    """Return the languages of all evaluations, and the pivot.

    The primary languages are first, then the pivot. The languages of each part are sorted by decreasing accuracy in the
    first run that has the language.
    """
    evaluations = [run.evaluation for run in runs if run.evaluation]
    pivot = evaluations[0]["pivot"]
    best: dict[str, float] = {}
    for evaluation in evaluations:
        for lang, score in evaluation["languages"].items():
            best.setdefault(lang, score["accuracy"])
    return sorted(best, key=lambda lang: (lang not in primary, lang != pivot, -best[lang], lang)), pivot


def _draw_accuracy(axes: Axes, runs: Sequence[RunResults], primary: Sequence[str]) -> None:
    """Draw accuracy bars with intervals, side by side for several runs. A single run also shows pivot agreement."""
    order, pivot = ordered_languages(runs, primary)
    evaluated = [run for run in runs if run.evaluation]
    width = 0.62 if len(evaluated) == 1 else 0.8 / len(evaluated)
    highest = 0.0
    for number, run in enumerate(evaluated):
        assert run.evaluation is not None
        scores = run.evaluation["languages"]
        shift = (number - (len(evaluated) - 1) / 2) * width
        positions = {lang: x + shift for x, lang in enumerate(order) if lang in scores}
        language_colors = [NAVY if lang == pivot else LIGHT for lang in positions]
        color = language_colors if len(evaluated) == 1 else run_color(runs, run)
        _draw_bars(axes, positions, scores, color, width, None if len(evaluated) == 1 else run.name)
        highest = max([highest, *(score["high"] for score in scores.values())])
        if len(evaluated) == 1:
            highest = max(highest, _draw_agreement(axes, positions, run.evaluation, pivot))
    crowded = len(order) * max(map(len, order)) > MAX_LABEL_CHARACTERS
    axes.set_xticks(range(len(order)), order, rotation=90 if crowded else 0)
    axes.set_ylim(0, min(1.12, max(0.1, 1.18 * highest)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(-0.6, max(len(order), 4) - 0.4)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4)
    title(axes, f"Accuracy per language, 95 % intervals ({pivot} is the pivot)")


def _draw_bars(
    axes: Axes, positions: dict[str, float], scores: dict[str, Any], color: Any, width: float, name: str | None
) -> None:
    heights = [scores[lang]["accuracy"] for lang in positions]
    below = [max(0.0, scores[lang]["accuracy"] - scores[lang]["low"]) for lang in positions]
    above = [max(0.0, scores[lang]["high"] - scores[lang]["accuracy"]) for lang in positions]
    xs = list(positions.values())
    axes.bar(xs, heights, color=color, width=0.94 * width, label=name)
    axes.errorbar(xs, heights, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=3)
    if len(positions) * (0.8 / width) <= 26:  # with more bars, the numbers would overlap
        for lang, x in positions.items():
            top, value = scores[lang]["high"] + 0.015, f"{100 * scores[lang]['accuracy']:.1f}"
            axes.text(x, top, value, ha="center", va="bottom", fontsize=9 if width > 0.5 else 7.5, color=INK)


def _draw_agreement(axes: Axes, positions: dict[str, float], evaluation: dict[str, Any], pivot: str) -> float:
    """Draw the agreement with the pivot as diamonds, and the mean accuracy. Return the highest agreement."""
    scores = evaluation["languages"]
    consistency = [(x + 0.2, scores[lang]["consistency_with_pivot"]) for lang, x in positions.items()]
    points = [(x, fraction) for x, fraction in consistency if fraction is not None]
    if points:
        xs, fractions = zip(*points, strict=True)
        diamonds = axes.scatter(xs, fractions, s=45, color=ORANGE, marker="D", edgecolors="white", zorder=4)
        diamonds.set(label=f"same answer as {pivot}", clip_on=False)
    mean = evaluation["macro"]["accuracy"]
    axes.axhline(mean, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1, label=f"mean {100 * mean:.1f} %")
    return max([0.0, *(fraction for _, fraction in points)])


def plot_differences(
    runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]], order: Sequence[str]
) -> Figure:
    """Plot the accuracy difference from the first run with 95 % intervals, for the mean and each language in order."""
    compared = {lang for comparison in comparisons.values() for lang in comparison["languages"]}
    names = ["mean of languages", *(lang for lang in order if lang in compared)]
    figure = new_figure(13.8, 1.1 + 0.16 * len(names) * (1 + len(comparisons)))
    axes = add_axes(figure, figure.add_gridspec(1, 1)[0])
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=1)
    for number, run in enumerate(run for run in runs if run.name in comparisons):
        comparison = comparisons[run.name]
        rows = [comparison["mean"], *(comparison["languages"].get(lang) for lang in names[1:])]
        for i, row in enumerate(rows):
            if row is None:
                continue
            y = i + (number - (len(comparisons) - 1) / 2) * 0.7 / len(comparisons)
            color = run_color(runs, run)
            axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.6)
            marker = "D" if i == 0 else "o"
            axes.plot(row["difference"], y, marker, color=color, label=run.name if i == 0 else None, markersize=6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:+.3g}"))
    axes.set_xlabel("percentage points", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4)
    title(axes, f"Accuracy minus that of {runs[0].name}, paired bootstrap 95 % intervals")
    return figure


def plot_agreement(runs: Sequence[RunResults]) -> Figure | None:
    """Plot one heat map per run of how often two languages give the same answer.

    Return None if no run has an agreement matrix.
    """
    shown = [(run, matrix) for run in runs if run.evaluation and (matrix := agreement_matrix(run.evaluation))]
    if not shown:
        return None
    size = max(4.8, 0.24 * max(len(matrix) for _, matrix in shown))
    figure = new_figure(size * len(shown), size)
    grid = figure.add_gridspec(1, len(shown))
    for column, (run, matrix) in enumerate(shown):
        axes = add_axes(figure, grid[0, column])
        heat_map(axes, list((run.evaluation or {})["languages"]), matrix, 0.0, 1.0)
        title(axes, f"{run.name}: fraction of same answers")
    return figure

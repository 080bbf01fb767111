"""The pictures of a report: curves, accuracies, differences, agreement, and states before and after."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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
    axes_of,
    figure_of,
    heat_map,
    title,
)
from pipeline.evaluation.consistency import agreement_matrix
from pipeline.report.runs import Metrics, Run, languages_of, series
from pipeline.representations.plots import color_of, draw_scatter, label, layers_of

CURVES = {
    "ce_loss": ("Cross-entropy", BLUE),
    "align_loss": ("Alignment loss", ORANGE),
    "align_cos": ("Alignment cosine", GREEN),
}


def overview(runs: Sequence[Run]) -> Figure:
    """Curves over steps in the upper row (those that were recorded), accuracy per language below."""
    recorded = _recorded(runs)
    evaluated = [run for run in runs if run.evaluation]
    rows, columns = max(1, bool(recorded) + bool(evaluated)), max(1, len(recorded))
    figure = figure_of(max(9.2, 4.6 * columns), 3.9 * rows)
    grid = figure.add_gridspec(rows, columns)
    for column, key in enumerate(recorded):
        _draw_curve(axes_of(figure, grid[0, column]), runs, key)
    if evaluated:
        _draw_accuracy(axes_of(figure, grid[-1, :]), runs)
    return figure


def curves(runs: Sequence[Run]) -> Figure | None:
    """The training curves alone; None where no run has any."""
    recorded = _recorded(runs)
    if not recorded:
        return None
    figure = figure_of(4.6 * max(2, len(recorded)), 3.9)
    grid = figure.add_gridspec(1, len(recorded))
    for column, key in enumerate(recorded):
        _draw_curve(axes_of(figure, grid[0, column]), runs, key)
    return figure


def accuracies(runs: Sequence[Run]) -> Figure | None:
    """Accuracy by language alone; None where no run was evaluated."""
    if not any(run.evaluation for run in runs):
        return None
    figure = figure_of(13.8, 4.2)
    _draw_accuracy(axes_of(figure, figure.add_gridspec(1, 1)[0]), runs)
    return figure


def _recorded(runs: Sequence[Run]) -> list[str]:
    return [key for key in CURVES if any(series(run.metrics, key)[1] for run in runs)]


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving average over `window` values, over fewer at the ends."""
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def arm_color(runs: Sequence[Run], run: Run) -> str:
    return RUN_COLORS[list(runs).index(run) % len(RUN_COLORS)]


def _draw_curve(axes: Axes, runs: Sequence[Run], key: str) -> None:
    """A quantity over steps, a line for each run; of one run alone, cross-entropy by language too."""
    heading, color = CURVES[key]
    if len(runs) == 1 and key == "ce_loss":
        _draw_languages(axes, runs[0].metrics)
    for run in runs:
        name = run.name if len(runs) > 1 else "all languages"
        _draw_smooth(axes, run.metrics, key, arm_color(runs, run) if len(runs) > 1 else color, name)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(runs) > 1 or key == "ce_loss":
        axes.legend(frameon=False, fontsize=8.5)
    title(axes, heading)


def _draw_smooth(axes: Axes, metrics: Metrics, key: str, color: str, name: str) -> None:
    """Smoothed, over its raw values, where there are many."""
    steps, values = series(metrics, key)
    if not values:
        return
    window = len(values) // 25
    if window >= 2:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, smooth(values, window), color=color, linewidth=1.9, label=name, marker=marker, zorder=3)


def _draw_languages(axes: Axes, metrics: Metrics) -> None:
    languages = [lang for lang in languages_of(metrics) if series(metrics, f"ce_loss_{lang}")[1]]
    for lang in languages:
        steps, values = series(metrics, f"ce_loss_{lang}")
        axes.plot(steps, smooth(values, len(values) // 25), color=GREY, linewidth=0.8, alpha=0.7)
    if languages:
        axes.plot([], [], color=GREY, linewidth=0.8, label=f"each of {len(languages)} languages")


def ordered_languages(runs: Sequence[Run]) -> tuple[list[str], str]:
    """Languages of all evaluations, the pivot first, then by falling accuracy of the first run; and the pivot."""
    evaluations = [run.evaluation for run in runs if run.evaluation]
    pivot = evaluations[0]["pivot"]
    best: dict[str, float] = {}
    for evaluation in evaluations:
        for lang, score in evaluation["languages"].items():
            best.setdefault(lang, score["accuracy"])
    return sorted(best, key=lambda lang: (lang != pivot, -best[lang], lang)), pivot


def _draw_accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    """Bars with intervals: of one run with the agreement with the pivot, of several side by side."""
    order, pivot = ordered_languages(runs)
    evaluated = [run for run in runs if run.evaluation]
    width = 0.62 if len(evaluated) == 1 else 0.8 / len(evaluated)
    highest = 0.0
    for number, run in enumerate(evaluated):
        assert run.evaluation is not None
        scores = run.evaluation["languages"]
        shift = (number - (len(evaluated) - 1) / 2) * width
        places = {lang: x + shift for x, lang in enumerate(order) if lang in scores}
        alone = [NAVY if lang == pivot else LIGHT for lang in places]
        color = alone if len(evaluated) == 1 else arm_color(runs, run)
        _draw_bars(axes, places, scores, color, width, None if len(evaluated) == 1 else run.name)
        highest = max([highest, *(score["high"] for score in scores.values())])
        if len(evaluated) == 1:
            highest = max(highest, _draw_agreement(axes, places, run.evaluation, pivot))
    axes.set_xticks(range(len(order)), order)
    axes.set_ylim(0, min(1.12, max(0.1, 1.18 * highest)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(-0.6, max(len(order), 4) - 0.4)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4)
    title(axes, f"Accuracy per language, 95 % intervals ({pivot} is the pivot)")


def _draw_bars(
    axes: Axes, places: dict[str, float], scores: dict[str, Any], color: Any, width: float, name: str | None
) -> None:
    heights = [scores[lang]["accuracy"] for lang in places]
    below = [max(0.0, scores[lang]["accuracy"] - scores[lang]["low"]) for lang in places]
    above = [max(0.0, scores[lang]["high"] - scores[lang]["accuracy"]) for lang in places]
    xs = list(places.values())
    axes.bar(xs, heights, color=color, width=0.94 * width, label=name)
    axes.errorbar(xs, heights, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=3)
    if len(places) * (0.8 / width) <= 26:  # else the numbers would run into each other
        for lang, x in places.items():
            top, value = scores[lang]["high"] + 0.015, f"{100 * scores[lang]['accuracy']:.1f}"
            axes.text(x, top, value, ha="center", va="bottom", fontsize=9 if width > 0.5 else 7.5, color=INK)


def _draw_agreement(axes: Axes, places: dict[str, float], evaluation: dict[str, Any], pivot: str) -> float:
    """Diamonds beside the intervals, and the mean accuracy; returns the highest diamond."""
    scores = evaluation["languages"]
    shares = [(x + 0.2, scores[lang]["consistency_with_pivot"]) for lang, x in places.items()]
    agreeing = [(x, share) for x, share in shares if share is not None]
    if agreeing:
        xs, agreement = zip(*agreeing, strict=True)
        diamonds = axes.scatter(xs, agreement, s=45, color=ORANGE, marker="D", edgecolors="white", zorder=4)
        diamonds.set(label=f"same answer as {pivot}", clip_on=False)
    mean = evaluation["macro"]["accuracy"]
    axes.axhline(mean, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1, label=f"mean {100 * mean:.1f} %")
    return max([0.0, *(share for _, share in agreeing)])


def differences(runs: Sequence[Run], comparisons: dict[str, dict[str, Any]]) -> Figure:
    """Accuracy minus the first run's with 95 % intervals, by language and for their mean."""
    names = ["mean of languages", *next(iter(comparisons.values()))["languages"]]
    figure = figure_of(13.8, 1.1 + 0.16 * len(names) * (1 + len(comparisons)))
    axes = axes_of(figure, figure.add_gridspec(1, 1)[0])
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=1)
    for number, run in enumerate(one for one in runs if one.name in comparisons):
        found = comparisons[run.name]
        rows = [found["mean"], *(found["languages"].get(lang) for lang in names[1:])]
        for place, row in enumerate(rows):
            if row is None:
                continue
            y = place + (number - (len(comparisons) - 1) / 2) * 0.7 / len(comparisons)
            color = arm_color(runs, run)
            axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.6)
            marker = "D" if place == 0 else "o"
            axes.plot(row["difference"], y, marker, color=color, label=run.name if place == 0 else None, markersize=6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:+.3g}"))
    axes.set_xlabel("percentage points", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4)
    title(axes, f"Accuracy minus that of {runs[0].name}, 95 % intervals of a paired bootstrap")
    return figure


def agreement(runs: Sequence[Run]) -> Figure | None:
    """Heat maps of equal answers by two languages, a map for each run that has them."""
    shown = [(run, matrix) for run in runs if run.evaluation and (matrix := agreement_matrix(run.evaluation))]
    if not shown:
        return None
    figure = figure_of(4.8 * len(shown), 4.8)
    grid = figure.add_gridspec(1, len(shown))
    for column, (run, matrix) in enumerate(shown):
        axes = axes_of(figure, grid[0, column])
        heat_map(axes, list((run.evaluation or {})["languages"]), matrix, 0.0, 1.0)
        title(axes, f"{run.name}: share of equal answers")
    return figure


def scatters(runs: Sequence[Run]) -> Figure | None:
    """The last state of each run and its soft tokens, run beside run: how languages lie before and after."""
    shown = [(run.name, run.representations) for run in runs if run.representations]
    if not shown:
        return None
    names = ["final", "soft_tokens"]
    if len(shown) == 1:
        figure = figure_of(9.2, 4.6)
        cells = [(shown[0][1], name, label(name)) for name in names]
        grid = figure.add_gridspec(1, 2)
    else:
        figure = figure_of(4.3 * len(shown), 8.4)
        cells = [(found, name, f"{run}: {label(name)}") for name in names for run, found in shown]
        grid = figure.add_gridspec(2, len(shown))
    for place, (found, name, heading) in enumerate(cells):
        draw_scatter(axes_of(figure, grid[place]), found, name, heading)
    first = shown[0][1]
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=color_of(first, lang), label=lang)
        for lang in first["languages"]
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def layers(runs: Sequence[Run]) -> Figure | None:
    """By layer: centred cosine, P@1 and silhouette of each run, the floors of shuffled pairs dotted."""
    shown = [(run, run.representations) for run in runs if run.representations]
    if not shown:
        return None
    figure = figure_of(13.8, 3.9)
    grid = figure.add_gridspec(1, 3)
    panels = {"centred_cosine": "Centred cosine of pairs", "retrieval": "Retrieval P@1", "silhouette": "Silhouette"}
    for column, (metric, heading) in enumerate(panels.items()):
        axes = axes_of(figure, grid[0, column])
        for run, found in shown:
            _draw_by_layer(axes, found, metric, arm_color(runs, run), run.name)
        depth = max(layers_of(shown[0][1]))
        axes.set_xlabel(f"layer, then the final norm (of {depth} layers)", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=8.5)
        title(axes, heading)
    return figure


def _draw_by_layer(axes: Axes, result: dict[str, Any], metric: str, color: str, name: str) -> None:
    places = layers_of(result)
    found = [result["representations"][key] for key in [*(f"layer_{i}" for i in places), "final"]]
    places = [*places, places[-1] + 1]
    if metric == "silhouette":
        values = [one["separability"][metric] for one in found]
    else:
        values = [one["similarity"]["all"][metric]["value"] for one in found]
        floors = [one["similarity"]["all"][metric]["floor"] for one in found]
        axes.plot(places, floors, color=color, linewidth=1, linestyle=(0, (2, 2)))
    axes.plot(places, values, color=color, linewidth=1.9, marker="o", markersize=4, label=name)

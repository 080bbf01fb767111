"""Plot the metrics in `representations.json`, written by `python -m pipeline.representations`."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.common.plotting import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LANGUAGE_COLORS,
    NAVY,
    ORANGE,
    add_axes,
    heat_map,
    new_figure,
    title,
)

TITLES = {"final": "after the final norm", "soft_tokens": "soft-token summaries"}
MARKERS = ("o", "^", "s", "D", "v", "P")  # one for each repetition of the colors
LAYER_CURVES = {"cosine": GREY, "centred_cosine": BLUE, "debiased_cka": ORANGE, "retrieval": GREEN}
METRIC_LABELS = {
    "cosine": "cosine",
    "centred_cosine": "centred cosine",
    "debiased_cka": "debiased CKA",
    "retrieval": "P@1",
}


def label(name: str) -> str:
    """Return the display name of a representation: `layer_3` becomes layer 3."""
    return TITLES.get(name, name.replace("_", " "))


def layers_of(result: dict[str, Any]) -> list[int]:
    """Return the numbers of the measured layers in ascending order."""
    return sorted(int(name.removeprefix("layer_")) for name in result["representations"] if name.startswith("layer_"))


def draw(result: dict[str, Any]) -> Figure:
    """Plot scatter plots in the upper row, and similarity by layer and a heat map of languages in the lower row."""
    figure = new_figure(13.8, 8.6)
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 1.1])
    scattered = [name for name, metrics in result["representations"].items() if "scatter" in metrics]
    for column, name in enumerate(scattered):
        draw_scatter(add_axes(figure, grid[0, column]), result, name, label(name))
    draw_layers(add_axes(figure, grid[1, :2]), result)
    draw_languages(add_axes(figure, grid[1, 2]), result, "final")
    draw_legend(figure, result)
    return figure


def color_of(result: dict[str, Any], lang: str) -> str:
    """Return the color of a language in all plots of a result."""
    return LANGUAGE_COLORS[result["languages"].index(lang) % len(LANGUAGE_COLORS)]


def marker_of(result: dict[str, Any], lang: str) -> str:
    """Return the marker of a language in all plots of a result. It differs between languages of the same color."""
    return MARKERS[result["languages"].index(lang) // len(LANGUAGE_COLORS) % len(MARKERS)]


def draw_legend(figure: Figure, result: dict[str, Any]) -> None:
    """Draw the legend of all languages above a figure, in as many columns as fit."""
    handles = [
        Line2D([], [], color=color_of(result, lang), marker=marker_of(result, lang), ls="", markersize=5, label=lang)
        for lang in result["languages"]
    ]
    entry_width = 0.5 + 0.08 * max(map(len, result["languages"]))  # inches
    columns = max(1, min(len(handles), int(figure.get_figwidth() / entry_width)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def draw_scatter(axes: Axes, result: dict[str, Any], name: str, heading: str) -> None:
    """Plot the first two principal components, with one color per language."""
    scatter = result["representations"][name]["scatter"]
    for lang, points in scatter["points"].items():
        xs, ys = zip(*points, strict=True)
        style: dict[str, Any] = {"color": color_of(result, lang), "marker": marker_of(result, lang)}
        axes.scatter(xs, ys, s=11, alpha=0.75, linewidths=0, **style)
    first, second = scatter["variance"]
    axes.set_xlabel(f"1st component, {first:.0%} of variance", fontsize=8.5, color=INK)
    axes.set_ylabel(f"2nd, {second:.0%}", fontsize=8.5, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    title(axes, heading)


def draw_layers(axes: Axes, result: dict[str, Any]) -> None:
    """Plot similarity by layer, then after the final norm and for soft tokens.

    Dotted lines and dashes are the values of shuffled pairs.
    """
    layers = layers_of(result)
    names = [f"layer_{layer}" for layer in layers]
    others = ["final", "soft_tokens"]
    xs = range(len(names))
    for metric, color in LAYER_CURVES.items():
        metrics = [result["representations"][name]["similarity"]["all"][metric] for name in [*names, *others]]
        values, floors = [m["value"] for m in metrics], [m["floor"] for m in metrics]
        axes.plot(xs, values[: len(names)], color=color, linewidth=1.9, marker="o", markersize=4)
        axes.plot(xs, floors[: len(names)], color=color, linewidth=1, linestyle=(0, (2, 2)))
        other_xs = [len(names) + i for i in range(len(others))]
        axes.scatter(
            other_xs, values[len(names) :], color=color, s=32, marker="D", label=METRIC_LABELS[metric], zorder=3
        )
        axes.scatter(other_xs, floors[len(names) :], color=color, s=30, marker="_", zorder=3)
    ticks = [str(layer) for layer in layers] + ["final\nnorm", "soft\ntokens"]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel("layer (0 is the embeddings)", fontsize=9, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.plot([], [], color=NAVY, linewidth=1, linestyle=(0, (2, 2)), label="shuffled pairs")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5)
    title(axes, "Similarity of translations")


def draw_languages(axes: Axes, result: dict[str, Any], name: str) -> None:
    """Plot the centered cosine of every pair of languages as a heat map."""
    languages, pairs = result["languages"], result["representations"][name]["pairs"]
    values: list[list[float | None]] = [[None] * len(languages) for _ in languages]
    for i, first in enumerate(languages):
        for j, second in enumerate(languages[i + 1 :], start=i + 1):
            values[i][j] = values[j][i] = pairs[first][second]["centred_cosine"]
    cosines = [value for row in values for value in row if value is not None]
    heat_map(axes, languages, values, min(0.0, *cosines), max(cosines))
    title(axes, f"Centred cosine, {label(name)}")

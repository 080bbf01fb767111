"""Plots of the representations of several runs."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.common.plotting import INK, add_axes, new_figure, title
from pipeline.report.plots import run_color
from pipeline.report.runs import RunResults
from pipeline.representations.plots import draw_legend, draw_scatter, label, layers_of


def plot_states(runs: Sequence[RunResults]) -> Figure | None:
    """Plot the principal components of the final state and the soft tokens of each run.

    Return None if no run has representations.
    """
    shown = [(run.name, run.representations) for run in runs if run.representations]
    if not shown:
        return None
    names = ["final", "soft_tokens"]
    if len(shown) == 1:
        figure = new_figure(9.2, 4.6)
        panels = [(shown[0][1], name, label(name)) for name in names]
        grid = figure.add_gridspec(1, 2)
    else:
        figure = new_figure(4.3 * len(shown), 8.4)
        panels = [(result, name, f"{run}: {label(name)}") for name in names for run, result in shown]
        grid = figure.add_gridspec(2, len(shown))
    for i, (result, name, heading) in enumerate(panels):
        draw_scatter(add_axes(figure, grid[i]), result, name, heading)
    draw_legend(figure, shown[0][1])
    return figure


def plot_layers(runs: Sequence[RunResults]) -> Figure | None:
    """Plot centered cosine, P@1 and silhouette by layer.

    Dotted lines are the values for shuffled pairs. Return None if no run has representations.
    """
    shown = [(run, run.representations) for run in runs if run.representations]
    if not shown:
        return None
    figure = new_figure(13.8, 3.9)
    grid = figure.add_gridspec(1, 3)
    panels = {"centred_cosine": "Centered cosine of pairs", "retrieval": "Retrieval P@1", "silhouette": "Silhouette"}
    for column, (metric, heading) in enumerate(panels.items()):
        axes = add_axes(figure, grid[0, column])
        for run, result in shown:
            _draw_by_layer(axes, result, metric, run_color(runs, run), run.name)
        depth = max(layers_of(shown[0][1]))
        axes.set_xlabel(f"layer, then the final norm (of {depth} layers)", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=8.5)
        title(axes, heading)
    return figure


def _draw_by_layer(axes: Axes, result: dict[str, Any], metric: str, color: str, name: str) -> None:
    layers = layers_of(result)
    states = [result["representations"][key] for key in [*(f"layer_{i}" for i in layers), "final"]]
    xs = [*layers, layers[-1] + 1]
    if metric == "silhouette":
        values = [state["separability"][metric] for state in states]
    else:
        values = [state["similarity"]["all"][metric]["value"] for state in states]
        floors = [state["similarity"]["all"][metric]["floor"] for state in states]
        axes.plot(xs, floors, color=color, linewidth=1, linestyle=(0, (2, 2)))
    axes.plot(xs, values, color=color, linewidth=1.9, marker="o", markersize=4, label=name)

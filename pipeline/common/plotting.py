"""The look of all pictures: colours, axes, titles."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, GREY = "#2b2b2b", "#9a9a9a"
BLUE, NAVY, LIGHT, ORANGE, GREEN = "#2f6db3", "#5b86b8", "#a9c5e6", "#d9822b", "#3a8f5c"
ARMS = (BLUE, ORANGE, GREEN, "#8a5ba8", "#b5463c", "#5f6b76", "#a3902c", "#2a9aa0")  # of runs side by side
# Twelve colours that stay apart for languages in one scatter (Paul Tol's "muted", and three more).
LANGUAGES = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499"),
    *("#e07b39", "#777777", "#1a1a1a"),
)
DPI = 130


def figure_of(width: float, height: float) -> Figure:
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), layout=engine, facecolor="white")


def axes_of(figure: Figure, cell: Any) -> Axes:
    axes = figure.add_subplot(cell)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)


def png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def heat_map(axes: Axes, names: list[str], values: list[list[float | None]], vmin: float, vmax: float) -> None:
    """A square matrix with its values written in; None (the diagonal) stays blank."""
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axes.imshow(shown, cmap="Blues", vmin=vmin, vmax=vmax)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    middle = (vmin + vmax) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                color = "white" if value > middle else INK
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)

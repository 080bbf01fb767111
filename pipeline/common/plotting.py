"""Common style of all plots: colors, axes, titles."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, GREY = "#2b2b2b", "#9a9a9a"
BLUE, NAVY, LIGHT, ORANGE, GREEN = "#2f6db3", "#5b86b8", "#a9c5e6", "#d9822b", "#3a8f5c"
RUN_COLORS = (BLUE, ORANGE, GREEN, "#8a5ba8", "#b5463c", "#5f6b76", "#a3902c", "#2a9aa0")  # one per run in a plot
# Twelve colors that remain distinguishable in one scatter plot: Paul Tol's "muted" palette and three more.
LANGUAGE_COLORS = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499"),
    *("#e07b39", "#777777", "#1a1a1a"),
)
DPI = 130
MAX_NUMBERED_ROWS = 16  # of a heat map


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure.

    Args:
        width: Inches.
        height: Inches.
    """
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), layout=engine, facecolor="white")


def add_axes(figure: Figure, cell: Any) -> Axes:
    """Add styled axes to a figure, in one cell of its GridSpec."""
    axes = figure.add_subplot(cell)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def title(axes: Axes, text: str) -> None:
    """Set a left-aligned title."""
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)


def png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def heat_map(axes: Axes, names: list[str], values: list[list[float | None]], vmin: float, vmax: float) -> None:
    """Draw a square matrix as a heat map. Cells with None stay blank.

    The values are shown as text, or by a color bar if there are too many.
    """
    cells = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(cells, cmap="Blues", vmin=vmin, vmax=vmax)
    crowded = len(names) > MAX_NUMBERED_ROWS
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(names)), names, rotation=90 if crowded else 0)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    if crowded:
        axes.tick_params(labelsize=7.5)
        axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02).outline.set_visible(False)
        return
    middle = (vmin + vmax) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                color = "white" if value > middle else INK
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)

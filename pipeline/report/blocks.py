"""Elements of a report: sections of paragraphs, tables, plots and code, independent of the output format."""

from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportTable:
    """Table of text cells.

    Attributes:
        header: cells of the header row.
        rows: cells of the other rows. The first cell is the row heading.
        text_cells: whether the other cells are left-aligned text instead of numbers.
        tiles: whether HTML shows each row of two cells as a tile.
        num_means: number of rows at the top that average the others; they are bold.
    """

    kind: ClassVar = "table"
    header: list[str]
    rows: list[list[str]]
    text_cells: bool = False
    tiles: bool = False
    num_means: int = 0


@dataclass(frozen=True)
class PlotBlock:
    """Plot with its alt text. Only shown in HTML."""

    kind: ClassVar = "plot"
    figure: Figure
    alt_text: str


@dataclass(frozen=True)
class CodeBlock:
    """Preformatted text. HTML folds it under its heading."""

    kind: ClassVar = "code"
    heading: str
    text: str


@dataclass(frozen=True)
class MarkdownBlock:
    """Paragraphs and tables in Markdown. HTML folds them under `summary` if it is not empty."""

    kind: ClassVar = "markdown"
    text: str
    summary: str = ""


ReportBlock = ReportTable | PlotBlock | CodeBlock | MarkdownBlock


@dataclass(frozen=True)
class Section:
    """Heading and content of a section."""

    heading: str
    blocks: list[ReportBlock]

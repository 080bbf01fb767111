"""Render the sections of a report as Markdown and as one self-contained HTML page."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.report.blocks import CodeBlock, PlotBlock, ReportBlock, ReportTable, Section

TEMPLATE = Path(__file__).with_name("page.html.j2")
# Only tables, code and emphasis: run names and paths must not become links, images or HTML.
MARKDOWN = MarkdownIt("zero").enable(["table", "backticks", "emphasis"])


def to_markdown(heading: str, summary: str, sections: Sequence[Section]) -> str:
    """Format the report as Markdown. Its only image is report.png."""
    parts = [f"# {heading}", summary, "![curves and accuracy](report.png)"]
    for section in sections:
        parts.append(f"## {section.heading}")
        parts += [_block_markdown(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block_markdown(block: ReportBlock) -> str:
    if isinstance(block, PlotBlock):
        return ""
    if isinstance(block, CodeBlock):
        return f"{block.heading}:\n\n```yaml\n{block.text}\n```"
    if isinstance(block, ReportTable):
        rule = "|---|" + ("---|" if block.text_cells else "---:|") * (len(block.header) - 1)
        means = [[f"**{cell}**" if cell else "" for cell in row] for row in block.rows[: block.num_means]]
        rows = means + block.rows[block.num_means :]
        return "\n".join([_markdown_row(block.header), rule, *map(_markdown_row, rows)])
    return f"**{block.summary}**\n\n{block.text}" if block.summary else block.text


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def to_html(heading: str, summary: str, sections: Sequence[Section], colors: dict[str, str]) -> str:
    """Format the report as a self-contained HTML page.

    Args:
        heading: title of the page.
        summary: paragraph below the title.
        sections: content of the page.
        colors: plot color of each run, shown next to its name in table headers; empty for a single run.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"anchor": _anchor, "svg": _svg_data_url, "markdown": _markdown_to_html}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(heading=heading, summary=summary, sections=sections, colors=colors)


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-")


def _markdown_to_html(text: str) -> Markup:
    tokens = MARKDOWN.parse(text)
    for i, token in enumerate(tokens):
        if token.type == "tr_open" and tokens[i + 1].type == "td_open":  # the first cell is the row heading
            tokens[i + 1].tag = tokens[i + 3].tag = "th"
            tokens[i + 1].attrSet("scope", "row")
    return Markup(MARKDOWN.renderer.render(tokens, MARKDOWN.options, {}))


def _svg_data_url(figure: Figure) -> str:
    """Return a figure as a data URL. Text is drawn as paths, so that no font is required."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # equal figures give equal bytes
        figure.savefig(content, format="svg", dpi=200, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()

"""A report's sections as Markdown and as one HTML page that needs nothing beside it."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from pipeline.report.sections import Block, Code, Markdown, Picture, Section, Table

TEMPLATE = Path(__file__).with_name("page.html.j2")


def to_markdown(heading: str, summary: str, sections: Sequence[Section]) -> str:
    """The report as text; its one picture is report.png."""
    parts = [f"# {heading}", summary, "![curves and accuracy](report.png)"]
    for section in sections:
        parts.append(f"## {section.heading}")
        parts += [text for block in section.blocks if (text := _markdown_of(block))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_of(block: Block) -> str:
    if isinstance(block, Picture):
        return ""
    if isinstance(block, Code):
        return f"{block.heading}:\n\n```yaml\n{block.text}\n```"
    if isinstance(block, Markdown):
        return block.text
    if isinstance(block, Table):
        rule = "|---|" + ("---|" if block.words else "---:|") * (len(block.header) - 1)
        return "\n".join([_row(block.header), rule, *map(_row, block.rows)])
    return block


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def to_html(heading: str, summary: str, sections: Sequence[Section], colors: dict[str, str]) -> str:
    """The page. colors: by run, that of its lines and bars, shown beside its name; empty for one run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = [
        {
            "heading": section.heading,
            "anchor": _anchor(section.heading),
            "blocks": [_html_of(b) for b in section.blocks],
        }
        for section in sections
    ]
    return template.render(heading=heading, summary=summary, sections=shown, colors=colors)


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-")


def _html_of(block: Block) -> dict[str, Any]:
    if isinstance(block, Picture):
        return {"kind": "picture", "source": _svg(block.figure), "text": block.text}
    if isinstance(block, Code):
        return {"kind": "code", "heading": block.heading, "text": block.text}
    if isinstance(block, Table):
        return {"kind": "table", "table": block}
    if isinstance(block, Markdown):
        return {"kind": "text", "parts": _fragments(block.text), "folded": block.folded}
    return {"kind": "text", "parts": _fragments(block), "folded": ""}


def _fragments(text: str) -> list[dict[str, Any]]:
    """Paragraphs and tables of the little Markdown that this project's tables are written in."""
    parts: list[dict[str, Any]] = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip().split("\n")
        if not lines[0].startswith("|"):
            parts.append({"kind": "paragraph", "text": _inline(" ".join(lines))})
            continue
        header, rule, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        words = not any(cell.endswith(":") for cell in rule[1:])
        rows = [[_inline(cell) for cell in row] for row in rows]
        parts.append({"kind": "table", "table": Table(header, rows, words)})
    return parts


def _inline(text: str) -> Markup:
    """Bold and code; everything else is text."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))


def _svg(figure: Figure) -> str:
    """A picture as a data address. Its text is drawn as paths, so it looks the same without any font."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # the same picture gives the same bytes
        figure.savefig(content, format="svg", dpi=200, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()

"""What lies behind the accuracies: what the token limit cut, and which rules read the answers."""

from collections.abc import Sequence
from typing import Any

from pipeline.evaluation.readings import reading_metrics, readings_table
from pipeline.evaluation.truncation import truncation_metrics, truncation_table


def detail_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the entries `truncation` and `readings` of `evaluation.json` from the rows of `generations.jsonl`."""
    return {"truncation": truncation_metrics(rows), "readings": reading_metrics(rows)}


def detail_tables(evaluation: dict[str, Any]) -> str:
    """Format both as Markdown tables. Return an empty string if there are none."""
    return "\n\n".join(filter(None, [truncation_table(evaluation), readings_table(evaluation)]))

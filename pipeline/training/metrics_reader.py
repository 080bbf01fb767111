"""Read the metrics.jsonl of a run: one record per optimizer step, and one per validation."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

METRICS = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the record of each optimizer step of a run, or an empty list if there are none yet.

    An incomplete last line, left by a killed process, is ignored.

    Raises:
        UserError: another line is damaged; the message names the file and the row.
    """
    return [record for record in read_records(directory) if "eval_loss" not in record]


def read_validations(directory: Path) -> list[dict[str, Any]]:
    """Return the record of each validation of a run, as `read_metrics`."""
    return [record for record in read_records(directory) if "eval_loss" in record]


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return all records in step order; see `read_metrics`. The validation of a step follows its training record."""
    path = directory / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: dict[tuple[int, bool], dict[str, Any]] = {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            records[int(values["step"]), "eval_loss" in values] = values
        except (ValueError, KeyError, TypeError):
            if row < len(lines):
                raise UserError(f"{path} row {row}: not a JSON object with a `step`; remove the line") from None
    return [records[key] for key in sorted(records)]

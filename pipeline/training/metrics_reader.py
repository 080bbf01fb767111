"""metrics.jsonl of a run, read: one record per optimizer step."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

METRICS = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run in the order of their steps; empty where there are none yet.

    A last line that a kill cut short is left out.

    Raises:
        UserError: another line is damaged; names file and row.
    """
    path = directory / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps: dict[int, dict[str, Any]] = {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            steps[int(values["step"])] = values
        except (ValueError, KeyError, TypeError):
            if row < len(lines):
                raise UserError(f"{path} row {row}: not a JSON object with a `step`; remove the line") from None
    return [steps[step] for step in sorted(steps)]

"""Read the metrics.jsonl of a run: one record per optimizer step."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

METRICS = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a run in step order, or an empty list if there are none yet.

    An incomplete last line, left by a killed process, is ignored.

    Raises:
        UserError: another line is damaged; the message names the file and the row.
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

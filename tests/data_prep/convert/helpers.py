"""Conversion of small inputs."""

import json
from pathlib import Path

from data_prep.convert.conversion import convert
from data_prep.convert.examples import Source
from data_prep.records import parse_record


def write_jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def run(format_name: str, *inputs: Path, output: Path, columns: dict | None = None, **source):
    report = convert(format_name, Source([str(path) for path in inputs], columns or {}, "en", **source), output)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for row in rows:
        parse_record(row)  # every converted record is canonical
    return report, rows

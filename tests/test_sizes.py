"""Limits of files and functions, so that each can be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.runs import ROOT

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def modules() -> Iterator[Path]:
    for folder in ("pipeline", "data_prep", "tests"):
        yield from (ROOT / folder).rglob("*.py")


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in modules()}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = count
    assert long == {}

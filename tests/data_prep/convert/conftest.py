"""Fixture of the conversion tests."""

import pytest


@pytest.fixture
def out(tmp_path):
    """Return the path of the converted records. Its folder does not exist yet."""
    return tmp_path / "out" / "x.jsonl"

"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four gloo ranks, shared by all tests of the run."""
    pool = Workers()
    yield pool
    pool.close()

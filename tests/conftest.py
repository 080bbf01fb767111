"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.runs import python
from tests.workers import Workers


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order and group the tests for pytest-xdist.

    The Slurm tests share one cluster, so one worker runs them all; they come first, because together they take longest.
    Slow tests are distributed one by one. The other tests of a file stay together.
    """

    def rank(item: pytest.Item) -> int:
        return 0 if item.path.parent.name == "slurm" else 1 if item.get_closest_marker("slow") else 2

    items.sort(key=rank)
    for item in items:
        if rank(item) != 1:
            item.add_marker(pytest.mark.xdist_group("slurm" if rank(item) == 0 else str(item.path)))


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four gloo ranks, shared by all tests of the run."""
    pool = Workers()
    yield pool
    pool.close()


@dataclass(frozen=True)
class Prepared:
    """A small generated data set, its tokenizer and its shards, made once for all tests."""

    data: Path
    test: Path
    tokenizer: Path
    shards: Path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    made = Prepared(root / "train.jsonl", root / "test.jsonl", root / "tokenizer", root / "shards")
    sizes = ["--train_problems", 60, "--low_resource_problems", 12, "--test_problems", 4]
    for words in (
        ["demo", "--output", made.data, "--test_output", made.test, *sizes],
        ["tokenizer", "--input", made.data, "--output", made.tokenizer, "--vocab_size", 600],
        ["pack", "--input", made.data, "--tokenizer", made.tokenizer, "--output", made.shards, "--max_seq_length", 512],
    ):
        result = python("-m", "data_prep", *words)
        assert result.returncode == 0, result.stderr
    return made

"""Fixtures shared by all tests."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"  # for test_interpreted_kernels; read when Triton is first imported

from tests.fork_server import start_server
from tests.runs import python

if TYPE_CHECKING:
    from tests.workers import Workers  # imports torch, which pytest-xdist's controller does not need

# Every process that a test, or pytest-xdist, starts with `sys.executable` is forked from the server.
sys.executable = str(start_server() / "python")


class Scheduler(LoadScopeScheduling):
    """pytest-xdist scheduler: one worker runs all Slurm tests, because they share one cluster.

    The tests of a training run are distributed one by one, other tests file by file.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if path.startswith("tests/slurm/"):
            return "tests/slurm"
        return nodeid if path.startswith(RUNS) else path


RUNS = (
    "tests/pipeline/training/",
    "tests/pipeline/fault_tolerance/test_faults",
    "tests/pipeline/checkpoint/test_reshard",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    config.option.loadscopereorder = False  # keep the order below, not that of the number of tests in a file
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the Slurm tests first, which together take longest, then the other slow tests."""
    items.sort(key=lambda item: (item.path.parent.name != "slurm", item.get_closest_marker("slow") is None))


@pytest.fixture(scope="session")
def workers() -> "Iterator[Workers]":
    """Four gloo ranks, shared by all tests of the run."""
    from tests.workers import Workers

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

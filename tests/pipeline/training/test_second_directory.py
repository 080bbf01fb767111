"""A run whose second directory is slow: it trains on, a signal ends it in time, and a restart copies its checkpoint."""

import json
import signal
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from tests.conftest import Prepared
from tests.runs import losses, start_ranks, train, write_recipe

# Trains with a second directory whose files are never finished.
SLOW_COPIES = """
import sys, time
from pipeline import train
from pipeline.checkpoint.second_directory import CheckpointCopier
from pipeline.fault_tolerance.signals import StopSignal

copy_file = CheckpointCopier._copy_file

def slow(copier, source, target):
    while not copier._stopped:
        time.sleep(0.01)
    return copy_file(copier, source, target)

CheckpointCopier._copy_file = slow
sys.exit(train.main(sys.argv[1:], StopSignal()))
"""


@pytest.mark.slow
def test_signal_to_one_rank_breaks_off_the_last_copy(prepared: Prepared, tmp_path: Path) -> None:
    settings = {"training__save_steps": 2, "training__save_total_limit": 1}
    settings["training__copy_checkpoints_to"] = str(tmp_path / "copies")
    recipe, run = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings), tmp_path / "run"
    processes = start_ranks(2, SLOW_COPIES, "--config", recipe, script="-c")
    deadline = time.monotonic() + 200
    while phase(run) != "copying the last checkpoint":  # both ranks report it while they wait
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)
    assert len(losses(run)) == 5
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    began = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert time.monotonic() - began < 20
    assert [process.returncode for process in processes] == [STOPPED_BY_SIGNAL] * 2, outputs
    assert "before the last checkpoint was copied; restart to copy it" in outputs[0]
    train(2, "--config", recipe)
    for directory in (run, tmp_path / "copies"):
        assert [path.name for path in layout.list_checkpoints(directory)] == ["checkpoint-5"]


def phase(run: Path) -> str | None:
    """Return what rank 1 does, according to its heartbeat."""
    path = run / "ranks" / "rank-00001.json"
    return json.loads(path.read_text())["phase"] if path.exists() else None

"""Two-rank runs that are suspended, killed or started twice: they fail cleanly and resume with the same losses."""

import re
import signal
from pathlib import Path

import pytest

from pipeline.common.exit_codes import RANK_FAILURE, STOPPED_BY_SIGNAL
from pipeline.fault_tolerance import watchdog
from pipeline.fault_tolerance.lock import RunLock
from pipeline.fault_tolerance.restarts import RestartLog, read_restart_log
from pipeline.fault_tolerance.watchdog import heartbeat_path
from pipeline.status import status
from tests.conftest import Prepared
from tests.pipeline.training.test_loop import wait_for_step
from tests.runs import Fork, losses, python, refuses, start_ranks, train, write_recipe

STEPS = 36


def errors(output: str) -> list[str]:
    """The error lines in an output."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


def wait_for_exit(processes: list[Fork]) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs, once all processes have ended."""
    outputs = [process.communicate(timeout=180) for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
def test_run_refuses_second_run_and_reports_suspended_rank(prepared: Prepared, tmp_path: Path) -> None:
    settings = {"training__max_steps": STEPS, "training__save_steps": 5, "training__hang_timeout_s": 30}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings)
    run = tmp_path / "run"
    slow = ["--training.max_steps", 100_000, "--training.lr_scheduler_type", "constant"]

    # A second run on the same directory is refused with one message and does not disturb the first.
    first = start_ranks(2, "--config", recipe, *slow)
    wait_for_step(run, 2, first)
    statuses, outputs = wait_for_exit(start_ranks(2, "--config", recipe))
    assert statuses == [2, 2], outputs
    assert len(errors("\n".join(outputs))) == 1 and f"{run}: in use by process {first[0].pid} on" in outputs[0]
    assert "running" in python("-m", "pipeline.status", run).stdout

    # A suspended rank blocks the others: they report it, write their stacks and exit.
    first[1].send_signal(signal.SIGSTOP)
    output = first[0].communicate(timeout=180)
    assert first[0].returncode == RANK_FAILURE
    assert len(errors(output)) == 1, output
    assert "rank 1 on" in errors(output)[0] and "sends no heartbeat" in errors(output)[0]
    assert re.search(r'loop\.py", line \d+ in train\b', (run / "ranks" / "rank-00000.stacks.txt").read_text())
    first[1].kill()
    first[1].wait()
    assert "failed" in python("-m", "pipeline.status", run).stdout


@pytest.mark.slow
def test_killed_rank_ends_others_and_no_step_is_lost(prepared: Prepared, tmp_path: Path) -> None:
    settings = {"training__max_steps": STEPS, "training__save_steps": 5, "training__train_batch_size": 2}
    whole = write_recipe(tmp_path / "whole.yaml", prepared.shards, prepared.tokenizer, **settings)
    train(2, "--config", whole)
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings)
    run = tmp_path / "run"
    for victim, step in ((1, 7), (0, 16)):
        ranks = start_ranks(2, "--config", recipe)
        wait_for_step(run, step, ranks)
        ranks[victim].send_signal(signal.SIGKILL)
        statuses, outputs = wait_for_exit(ranks)
        assert statuses[1 - victim] == RANK_FAILURE, outputs
        lines = errors("\n".join(outputs))
        assert len(lines) == 1 and "lost contact" in lines[0] and f"rank {victim} on" in lines[0]
        assert "Traceback" not in "\n".join(outputs)
    train(2, "--config", recipe)
    assert losses(run) == losses(tmp_path / "whole")
    steps = [event["step"] for event in read_restart_log(run) if event["event"] == "start"]
    assert steps[0] == 0 and steps == sorted(steps) and steps[-1] >= 10
    assert "done" in python("-m", "pipeline.status", run).stdout


def test_status_of_a_restart_that_is_not_recorded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart first verifies the shards and its checkpoint, which takes minutes."""
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.1)
    log = RestartLog(tmp_path, 0)
    log.record_start(0, 9, 1)
    log.record_end(5, STOPPED_BY_SIGNAL, 0.1)
    (tmp_path / "ranks").mkdir()
    lock = RunLock(tmp_path, heartbeat_path(tmp_path, 0), 0)
    heartbeats = watchdog.Watchdog(tmp_path, lock.token, 0, 1, 60)
    heartbeats.start()
    assert "state        running" in status(tmp_path)[0]
    heartbeats.close()
    lock.release()
    assert "state        stopped by a signal" in status(tmp_path)[0]


def test_status_of_a_finished_run_whose_restart_was_refused(tmp_path: Path) -> None:
    """The refused start is not in the log, so the run itself is still done."""
    log = RestartLog(tmp_path, 0)
    log.record_start(0, 9, 1)
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "failed.json").write_text('{"status": 2, "message": "error: other settings"}')
    assert "state        failed (" in status(tmp_path)[0]
    log.record_end(9, 0, None)
    lines = status(tmp_path)
    assert "state        done; then a start failed (" in lines[0] and lines[-1] == "failure      other settings"


def test_status_without_a_run(tmp_path: Path) -> None:
    refuses(python("-m", "pipeline.status", tmp_path), "no run has started in this directory", "output_dir")

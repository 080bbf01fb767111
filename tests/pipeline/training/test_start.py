"""The checkpoint that a run resumes from if files are damaged or cannot be read, without an engine."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import COMPLETE_MARKER, DAMAGED_MARKER
from pipeline.common.atomic_io import sha256_file
from pipeline.common.errors import AgreedError, UserError
from pipeline.common.exit_codes import READ_FAILURE, USER_ERROR
from pipeline.config.recipe import load_config
from pipeline.fault_tolerance.guard import Guard
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.training import loop
from pipeline.training.preflight import PreparedRun, prepare_run
from pipeline.training.resume_checks import ResumePoint
from pipeline.training.start import find_checkpoint, record_start
from tests.conftest import Prepared
from tests.runs import write_recipe


@pytest.fixture
def run(prepared: Prepared, tmp_path: Path) -> PreparedRun:
    return prepare_run(load_config(write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer), []), 0, 1)


@pytest.fixture
def guard(run: PreparedRun) -> Iterator[Guard]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield Guard(Path(run.config.output_dir), StopSignal(), timeout=60, started_at=0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def save_without_weights(run: PreparedRun, step: int) -> Path:
    """Write the files of a checkpoint that are read before an engine exists."""
    path = Path(run.config.output_dir) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"step": step, "ranks": 1, **asdict(run.identity)}))
    (path / "config.yaml").write_text(layout.recipe_yaml(run.config))
    run.model_config.save_pretrained(path / "model_config")
    complete(path)
    return path


def complete(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != COMPLETE_MARKER]
    records = {str(file.relative_to(path)): (file.stat().st_size, sha256_file(file)) for file in files}
    (path / COMPLETE_MARKER).write_text(layout.complete_marker(records))


def found_step(run: PreparedRun, guard: Guard) -> int | None:
    point = find_checkpoint(run, guard)
    return None if point is None else point.state["step"]


@pytest.mark.parametrize("name", ["trainer_state.json", "config.yaml", "model_config/config.json"])
def test_find_checkpoint_skips_altered_metadata(run: PreparedRun, guard: Guard, name: str) -> None:
    assert found_step(run, guard) is None
    for step in (2, 4):
        path = save_without_weights(run, step)
    assert found_step(run, guard) == 4
    content = (path / name).read_bytes()
    (path / name).write_bytes(b"[" + content[1:])
    assert found_step(run, guard) == 2
    assert (path / DAMAGED_MARKER).is_file() and not (path / COMPLETE_MARKER).exists()


@pytest.mark.parametrize("failure", ["EIO", "ENOENT", "ELOOP", "EIO of COMPLETE"])
def test_find_checkpoint_read_error_is_not_damage(run: PreparedRun, guard: Guard, failure: str) -> None:
    """The checkpoint is not skipped. The run ends with a status after which Slurm requeues it."""
    save_without_weights(run, 2)
    path = save_without_weights(run, 4)
    file = path / "rng-0.safetensors"
    file.touch()
    complete(path)
    if failure.startswith("EIO"):  # when it is read; its size is 0
        file = file if failure == "EIO" else path / COMPLETE_MARKER
        file.unlink()
        file.symlink_to("/proc/self/mem")
    elif failure == "ENOENT":  # visible when sizes are compared, but no longer when it is read
        marker = json.loads((path / COMPLETE_MARKER).read_text())
        del marker["files"][file.name]
        (path / COMPLETE_MARKER).write_text(json.dumps(marker))
        file.unlink()
    else:  # when its size is queried
        file.unlink()
        file.symlink_to(file.name)
    before = sorted(os.listdir(path))
    with pytest.raises(AgreedError, match=rf"cannot read {file}: .*; check the file system and restart") as caught:
        find_checkpoint(run, guard)
    assert caught.value.status == READ_FAILURE and "\n" not in str(caught.value)
    assert sorted(os.listdir(path)) == before


def test_find_checkpoint_of_another_run(run: PreparedRun, guard: Guard, tmp_path: Path) -> None:
    """Two runs with the same second directory: the second one does not continue the first one unless that is lost."""
    path, copies, other = save_without_weights(run, 2), tmp_path / "copies", tmp_path / "other"
    shutil.copytree(path, copies / path.name)
    changes = ["--output_dir", str(other), "--training.copy_checkpoints_to", str(copies), "--training.save_steps", "3"]
    second = prepare_run(load_config(tmp_path / "run.yaml", changes), 0, 1)
    message = rf"copies/checkpoint-2: a checkpoint of the run in {path.parent}; give this run another training\.copy_ch"
    with pytest.raises(AgreedError, match=message):
        find_checkpoint(second, guard)
    shutil.rmtree(path)
    assert found_step(second, guard) == 2


def test_find_checkpoint_all_damaged(run: PreparedRun, guard: Guard) -> None:
    """A run with checkpoints never starts at step 0, which would delete them and the metrics."""
    for step in (2, 4, 10):
        path = save_without_weights(run, step)
        state = (path / "trainer_state.json").read_bytes()
        (path / "trainer_state.json").write_bytes(state[:-1] if step == 4 else state[:-1] + b"!")
    for _ in range(2):
        message = r"run: all checkpoints are damaged \(checkpoint-2, checkpoint-4, checkpoint-10\); restore one"
        with pytest.raises(AgreedError, match=message) as caught:
            find_checkpoint(run, guard)
        assert caught.value.status == USER_ERROR


def test_record_start_names_log_that_cannot_be_written(run: PreparedRun, guard: Guard) -> None:
    (Path(run.config.output_dir) / "starts.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*starts\.jsonl: Is a directory; fix the cause and restart"):
        record_start(run, None, guard)


def test_phase_while_a_resumed_run_loads_its_model(
    run: PreparedRun, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception):
        """Ends the run."""

    def setup_engine(run: PreparedRun, checkpoint: ResumePoint) -> None:
        assert checkpoint.state["step"] == 2
        raise Loading

    monkeypatch.setattr(loop, "setup_engine", setup_engine)
    save_without_weights(run, 2)
    with pytest.raises(Loading):
        loop.train(run, guard)
    assert guard._watchdog._progress[:2] == (0, "loading the model")


def test_prepare_run_reads_vocabulary_weights_before_the_model(prepared: Prepared, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer)
    config = load_config(recipe, ["--loss.vocabulary_weights", str(tmp_path / "none.safetensors")])
    with pytest.raises(UserError, match=r"none.safetensors: loss.vocabulary_weights needs a safetensors file"):
        prepare_run(config, 0, 1)

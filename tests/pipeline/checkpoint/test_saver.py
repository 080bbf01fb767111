"""Copies of checkpoints in a second directory, and a failed save, without a training run."""

import json
import os
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.second_directory import CheckpointCopier
from pipeline.common.errors import AgreedError, UserError
from pipeline.config.settings import Config, TrainingSettings
from tests.pipeline.checkpoint.test_layout import make_checkpoint


def make_saver(root: Path, step: int = 0, best_step: int | None = None, copies: str = "copies") -> Any:
    training = TrainingSettings(copy_checkpoints_to=str(root / copies), save_in_background=False)
    config = Config(output_dir=str(root / "run"), training=training)
    identity: Any = None
    engine: Any = SimpleNamespace(device="cpu")
    return Saver(config, identity, {}, engine, {"step": step, "validation": {"best_step": best_step}})


def finish_copies(saver: Any, stopping: bool = False) -> bool:
    return saver.finish_copies(lambda: None, lambda: stopping)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_saver_removes_unfinished_checkpoints_in_both_directories(tmp_path: Path) -> None:
    for name in ("run", "copies"):
        (tmp_path / name / ".checkpoint-5.partial" / "deepspeed").mkdir(parents=True)
        (tmp_path / name / "checkpoint-4").mkdir()
    make_saver(tmp_path)
    assert [names(tmp_path / name) for name in ("run", "copies")] == [["checkpoint-4"]] * 2


def test_saver_removes_a_checkpoint_whose_deletion_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    make_checkpoint(run, 2)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        layout.remove_checkpoint(run / "checkpoint-2")
    assert layout.list_checkpoints(run) == []
    make_saver(tmp_path)
    assert names(run) == []


def test_copy_is_broken_off_when_a_run_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver, source = make_saver(tmp_path), tmp_path / "run" / "checkpoint-7"
    source.mkdir(parents=True)
    os.mkfifo(source / "weights")  # blocks its reader
    saver._copier.start(source, None)
    with open(source / "weights", "wb", buffering=0) as file:
        assert not finish_copies(saver, stopping=True)
        file.write(b"1")
    assert finish_copies(saver)
    assert names(tmp_path / "copies") == []
    assert "warning: checkpoint-7 not copied" in capsys.readouterr().out


def test_restart_copies_the_checkpoint_it_resumes_from(tmp_path: Path) -> None:
    """Copy it with its validation, which is added to an existing copy too, and the best checkpoint."""
    (tmp_path / "run").mkdir()
    for step in (2, 6):
        make_checkpoint(tmp_path / "run", step)
    assert finish_copies(make_saver(tmp_path, 6, best_step=2))
    assert names(tmp_path / "copies") == ["checkpoint-2", "checkpoint-6"]
    assert not any(layout.find_damage(tmp_path / "copies" / name) for name in names(tmp_path / "copies"))
    validation = {"step": 6, "best_step": 6}
    saver = make_saver(tmp_path, 6, best_step=2)
    saver.start({"step": 6, "validation": validation}, best_step=6)
    assert finish_copies(saver)
    for directory in ("run", "copies"):
        assert layout.read_state(tmp_path / directory / "checkpoint-6")["validation"] == validation


def test_restart_does_not_need_the_second_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be on a file system that fails. Here, a name that is too long makes every call fail."""
    (tmp_path / "run").mkdir()
    make_checkpoint(tmp_path / "run", 2)
    assert finish_copies(make_saver(tmp_path, 2, copies="x" * 256))
    line = capsys.readouterr().out.strip()
    assert line.startswith("warning: checkpoint-2 not copied to") and "File name too long" in line


def test_copy_ends_at_the_first_file_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a full disk, one line gives the reason."""
    (tmp_path / "run").mkdir()
    make_checkpoint(tmp_path / "run", 6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        assert finish_copies(make_saver(tmp_path, 6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = f"warning: checkpoint-6 not copied to {tmp_path / 'copies'}: File too large\n"
    assert (capsys.readouterr().out, names(tmp_path / "copies")) == (line, [])


def test_copies_replace_only_those_of_the_same_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotation would delete a checkpoint of another run, or the copy if there is a newer one. Both are kept."""
    run, copies = tmp_path / "run", tmp_path / "copies"
    for directory in (run, copies):
        directory.mkdir()
    others = {2: "of another run", 6: "not a copy of it", 9: "newer"}
    for path in (make_checkpoint(run, 6), *(make_checkpoint(copies, step) for step in others)):
        is_own, is_copy = path != copies / "checkpoint-2", path != copies / "checkpoint-6"
        state = json.dumps({"run_id": "own" if is_own else "other"})
        (path / "trainer_state.json").write_text(state)
        marker = {"id": "x" if is_copy else "y", "files": {"trainer_state.json": len(state)}}
        (path / layout.COMPLETE_MARKER).write_text(json.dumps(marker))
    for step, what in others.items():
        before = names(copies)
        assert finish_copies(make_saver(tmp_path, 6))
        line = f"warning: checkpoint-6 not copied to {copies}: checkpoint-{step} there is {what}; move it away\n"
        assert (capsys.readouterr().out, names(copies)) == (line, before)
        shutil.rmtree(copies / f"checkpoint-{step}")
    assert finish_copies(make_saver(tmp_path, 6))
    assert (names(copies), capsys.readouterr().out) == (["checkpoint-6"], "")


def test_slow_copy_is_finished_before_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves do not wait for it, rotation keeps its source, and the checkpoints between are skipped."""
    resume, copying, copied = threading.Event(), threading.Event(), []
    copy_file = CheckpointCopier._copy_file

    def slow(copier: CheckpointCopier, source: str, target: str) -> str:
        copied.append(Path(source).parent.name)
        copying.set()
        assert resume.wait(20)
        return copy_file(copier, source, target)

    monkeypatch.setattr(CheckpointCopier, "_copy_file", slow)
    saver, run = make_saver(tmp_path), tmp_path / "run"
    run.mkdir()
    for step in (2, 4, 6, 8):
        saver._commit(make_partial(run, step))
        assert copying.wait(20)
    assert names(run) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    resume.set()
    assert finish_copies(saver)
    assert copied == ["checkpoint-2"] * 2 + ["checkpoint-8"] * 2
    assert names(run) == ["checkpoint-6", "checkpoint-8"]
    assert names(tmp_path / "copies") == ["checkpoint-2", "checkpoint-8"]


def test_file_list_of_a_rank_that_cannot_be_read(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    (tmp_path / "run").mkdir()
    partial = make_partial(tmp_path / "run", 2)
    (partial / "files-0.json").unlink()
    (partial / "files-0.json").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*\.checkpoint-2\.partial: Is a directory; fix the cause"):
        saver._commit(partial)


def test_bug_in_the_save_thread_is_no_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = make_saver(tmp_path)
    saver._job = saver._thread.submit(lambda: {}["added_tokens"])
    with pytest.raises(AgreedError, match=r"^rank 0 on .*: KeyError: 'added_tokens'$") as caught:
        saver.finish()
    assert caught.value.status == 1
    assert "Traceback" in capsys.readouterr().err


def make_partial(run: Path, step: int) -> Path:
    """A checkpoint that its only rank has written."""
    partial = run / f".checkpoint-{step}.partial"
    partial.mkdir()
    (partial / "weights").write_bytes(b"1")
    (partial / "files-0.json").write_text('{"weights": [1, "hash"]}')
    return partial

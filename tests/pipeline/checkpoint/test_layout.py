"""Completeness, rotation and model checks of checkpoint directories, without an engine."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.checkpoint import layout
from pipeline.checkpoint.export_record import checkpoint_id
from pipeline.checkpoint.layout import COMPLETE_MARKER, ModelIdentity
from pipeline.checkpoint.resume import check_resumable
from pipeline.common.errors import UserError

MODEL = ModelIdentity(vocab_size=600, padded_size=640, languages=["en", "sw"])


def make_checkpoint(run: Path, step: int) -> Path:
    path = run / f"checkpoint-{step}"
    path.mkdir()
    state = json.dumps({"step": step, **asdict(MODEL)})
    (path / "trainer_state.json").write_text(state)
    (path / COMPLETE_MARKER).write_text(json.dumps({"id": "x", "files": {"trainer_state.json": len(state)}}))
    return path


def test_newest_checkpoint_skips_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 10, 9, 8):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # never completed
    assert [layout.step_of(path) for path in layout.list_checkpoints(tmp_path)] == [2, 8, 9, 10]
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    (tmp_path / "checkpoint-9" / COMPLETE_MARKER).write_text('{"files": {"trai')
    with (tmp_path / "checkpoint-8" / "trainer_state.json").open("a") as file:
        file.write(" ")  # overlong
    assert layout.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    output = capsys.readouterr().out
    assert "checkpoint-10/trainer_state.json has 1 bytes" in output and "checkpoint-9/COMPLETE is missing" in output
    assert "checkpoint-8/trainer_state.json has " in output
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert layout.newest_checkpoint(tmp_path) is None


def test_rotate_checkpoints_keeps_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        make_checkpoint(tmp_path, step)
    for step in (8, 10):
        layout.universal_path(tmp_path, tmp_path / f"checkpoint-{step}").mkdir()
    layout.rotate_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".checkpoint-10.universal",
        "checkpoint-10",
        "checkpoint-9",
    ]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (2, 2, [2, 6]),
        (3, 2, [2, 5, 6]),
        (1, 2, [2, 6]),
        (2, 6, [5, 6]),
        (1, 6, [6]),
        (2, 3, [5, 6]),
        (9, 2, [2, 4, 5, 6]),
    ],
)
def test_rotate_checkpoints_keeps_best(tmp_path: Path, limit: int, best: int, kept: list[int]) -> None:
    """The best checkpoint counts, but is never deleted, nor is the newest. Step 3 has no checkpoint."""
    for step in (2, 4, 5, 6):
        make_checkpoint(tmp_path, step)
    layout.rotate_checkpoints(tmp_path, limit, best)
    assert [layout.step_of(path) for path in layout.list_checkpoints(tmp_path)] == kept


@pytest.mark.parametrize("damaged", [[6], [5, 6]])
def test_rotate_checkpoints_ignores_damaged(tmp_path: Path, damaged: list[int]) -> None:
    """A damaged checkpoint does not count as one of those to keep, even if it is the newest or cannot be read."""
    for step in (2, 4, 5, 6):
        path = make_checkpoint(tmp_path, step)
        if step in damaged:
            (path / "trainer_state.json").unlink()
    if 5 in damaged:
        (path / "trainer_state.json").symlink_to("trainer_state.json")  # ELOOP
    layout.rotate_checkpoints(tmp_path, 2)
    intact = [4, 5] if damaged == [6] else [2, 4]
    assert [layout.step_of(path) for path in layout.list_checkpoints(tmp_path)] == sorted(intact + damaged)


def test_store_validation_keeps_checkpoint_intact(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    state, validation = layout.read_state(path), {"step": 5, "best_step": 5, "best_metric": 1.5}
    layout.store_validation(path, validation)
    assert layout.read_state(path) == state | {"validation": validation}
    assert layout.find_damage(path) is None and checkpoint_id(path) == "x"
    layout.store_validation(tmp_path / "checkpoint-6", validation)
    assert not (tmp_path / "checkpoint-6").exists()


def test_check_resumable_refuses_other_model(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    assert check_resumable(path, MODEL)["step"] == 5
    with pytest.raises(UserError, match=r"checkpoint of a different model \(vocabulary 600 padded to 640, here 601 .*"):
        check_resumable(path, replace(MODEL, vocab_size=601))
    with pytest.raises(UserError, match=r"embedding_learning_rate was null when it was saved and is set here"):
        check_resumable(path, replace(MODEL, embedding_group=True))
    with pytest.raises(UserError, match="checkpoint of different data"):
        check_resumable(path, replace(MODEL, languages=["sw", "en"]))

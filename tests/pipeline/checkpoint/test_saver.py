"""Copies of checkpoints in a second directory, without a training run."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.checkpoint.saver import Saver
from pipeline.config.settings import Config, TrainingSettings


def make_saver(root: Path) -> Any:
    training = TrainingSettings(copy_checkpoints_to=str(root / "copies"), save_in_background=False)
    config = Config(output_dir=str(root / "run"), training=training)
    identity: Any = None
    engine: Any = SimpleNamespace(device="cpu")
    return Saver(config, identity, {}, engine, {"step": 0, "validation": {}})


def test_saver_removes_unfinished_checkpoints_in_both_directories(tmp_path: Path) -> None:
    for name in ("run", "copies"):
        (tmp_path / name / ".checkpoint-5.partial" / "deepspeed").mkdir(parents=True)
        (tmp_path / name / "checkpoint-4").mkdir()
    make_saver(tmp_path)
    assert [sorted(os.listdir(tmp_path / name)) for name in ("run", "copies")] == [["checkpoint-4"]] * 2


def test_copy_is_broken_off_when_a_run_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver, source = make_saver(tmp_path), tmp_path / "run" / "checkpoint-7"
    source.mkdir(parents=True)
    os.mkfifo(source / "weights")

    def write() -> None:
        with open(source / "weights", "wb", buffering=0) as file:
            saver.stop_copying()
            file.write(b"1")

    writer = threading.Thread(target=write)
    writer.start()
    saver._copy_to_second_directory(source, 2)
    writer.join()
    assert os.listdir(tmp_path / "copies") == []
    assert "warning: checkpoint-7 not copied" in capsys.readouterr().out

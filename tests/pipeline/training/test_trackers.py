"""Experiment trackers, with TensorBoard and a tracker registered here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.common.errors import UserError
from pipeline.config.settings import Config, TrainingSettings
from pipeline.training.metrics import MetricsWriter
from pipeline.training.trackers import Trackers, select_trackers


class ListTracker(GeneralTracker):
    """A tracker that keeps what it is given in lists."""

    name = "lists"
    requires_logging_directory = False
    failing: ClassVar[str] = ""
    events: ClassVar[list[tuple]] = []

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.events.append(("init", run_name, kwargs))

    @property
    def tracker(self) -> list[tuple]:
        return self.events

    def store_init_configuration(self, values: dict) -> None:
        self.events.append(("config", values))

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        if self.failing == "log":
            raise ConnectionError("no route to host\nmore")
        self.events.append(("log", step, values))

    def finish(self) -> None:
        self.events.append(("finish",))


@pytest.fixture(autouse=True)
def lists() -> Iterator[list[tuple]]:
    ListTracker.events.clear()
    ListTracker.failing = ""
    register_tracker_class(ListTracker)
    yield ListTracker.events
    del LOGGER_TYPE_TO_CLASS["lists"]


def write_steps(directory: Path, first_step: int, last_step: int, *names: str) -> None:
    """Log steps as the training loop does."""
    config = Config(output_dir=str(directory), training=TrainingSettings(report_to=names))
    trackers = Trackers(select_trackers(config.training.report_to), config, first_step)
    writer = MetricsWriter(directory, True, first_step, last_step, 6.0, 1, trackers)
    for step in range(first_step + 1, last_step + 1):
        writer.log({"step": step, "ce_loss": 1.0 / step, "align_cos": None}, 100.0)
    writer.close()
    writer.finish_trackers()


def test_trackers_log_config_and_steps(tmp_path: Path, lists: list[tuple]) -> None:
    write_steps(tmp_path, 0, 3, "tensorboard", "lists")
    assert [event[0] for event in lists] == ["init", "config", "log", "log", "log", "finish"]
    assert lists[1][1]["training.learning_rate"] == 1e-5 and json.loads(lists[1][1]["loss.detach"]) == ["pivot"]
    step, values = lists[3][1:]
    assert step == 2 and values["train/ce_loss"] == 0.5 and "train/align_cos" not in values
    assert set(map(type, values.values())) <= {int, float}

    validation = {"step": 3, "eval_loss": 2.0, "eval_ce_sw": None, "best_metric": 2.0, "best_step": 3}
    Trackers(["lists"], Config(output_dir=str(tmp_path)), 3).log(validation, 3)
    assert lists[-1] == ("log", 3, {"eval/loss": 2.0, "eval/best_metric": 2.0, "eval/best_step": 3})

    write_steps(tmp_path, 2, 4, "tensorboard")  # resumed: step 3 of the earlier start is purged
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/ce_loss")] == [1, 2, 3, 4]
    assert b"learning_rate: 1.0e-05" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_trackers_failure_is_one_warning(
    tmp_path: Path, lists: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    ListTracker.failing = "log"
    write_steps(tmp_path, 0, 3, "lists", "tensorboard")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == ["warning: lists: cannot log: no route to host; training continues without it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/ce_loss")) == 3


def test_trackers_resume_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: list[tuple]) -> None:
    """A tracker in the place of W&B's gets the same run id when the run resumes, and a new one for a new run."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", ListTracker)
    config = Config(output_dir=str(tmp_path))
    for first_step in (0, 5, 0):
        Trackers(["wandb"], config, first_step)
    options = [event[2] for event in lists if event[0] == "init"]
    assert options[0]["id"] == options[1]["id"] != options[2]["id"]
    assert options[0] == {"id": options[0]["id"], "resume": "allow", "dir": str(tmp_path), "name": str(tmp_path)}


@pytest.mark.parametrize(
    ("report_to", "message"),
    [("wandbb", "unknown tracker 'wandbb'"), (("tensorboard", "aim"), "aim is not installed; run `pip install aim`")],
)
def test_select_trackers_refuses(report_to: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_trackers(report_to)


def test_select_trackers_all_and_none() -> None:
    assert "tensorboard" in select_trackers("all")
    assert select_trackers("none") == select_trackers(()) == []

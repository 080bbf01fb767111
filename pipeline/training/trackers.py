"""Experiment trackers: TensorBoard, W&B, MLflow and the others of `accelerate.tracking`, chosen by training.report_to.

A tracker logs from rank 0. OUTPUT/trackers.json keeps the run ids, so that a resumed run continues the tracker's run.
"""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from pipeline.checkpoint.layout import recipe_yaml
from pipeline.common.atomic_io import read_json_or_none, write_json
from pipeline.common.errors import UserError
from pipeline.config.fields import leaf_fields, value_of
from pipeline.config.settings import Config

RUN_IDS = "trackers.json"
PROJECT = "solar-train"
# accelerate passes a project name, which would override the variable that each tracker reads itself.
PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "swanlab": "SWANLAB_PROJECT",
}


def select_trackers(report_to: str | tuple[str, ...]) -> list[str]:
    """Return the names of the trackers that `training.report_to` selects.

    Raises:
        UserError: a name is unknown, or its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names == ["none"]:
        return []
    installed = [str(name) for name in get_available_trackers()]
    if names == ["all"]:
        return installed
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join([*sorted(LOGGER_TYPE_TO_CLASS), "all", "none"])
            raise UserError(f"training.report_to: unknown tracker {name!r}; use one or several of {known}")
        if name in LoggerType.list() and name not in installed:
            package = name.replace("_", "-")
            raise UserError(f"training.report_to: {name} is not installed; run `pip install {package}` or remove it")
    return list(dict.fromkeys(names))


class Trackers:
    """The trackers of a run, for rank 0. A tracker that fails is dropped with one warning, and the run continues.

    Args:
        names: their names, from `select_trackers`.
        config: the recipe.
        first_step: number of finished steps; more than 0 if the run is resumed.
    """

    def __init__(self, names: list[str], config: Config, first_step: int) -> None:
        self._active: dict[str, GeneralTracker] = {}
        self._directory = Path(config.output_dir)
        # Only the device is set explicitly: accelerate takes ranks from the process group, and must not select a GPU.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        PartialState()
        ids = read_json_or_none(self._directory / RUN_IDS) or {}
        for name in names:
            self._attempt(name, "start", lambda name=name: self._start(name, config, first_step, ids))  # type: ignore[misc]
        if ids:
            self._attempt("", "be written", lambda: write_json(self._directory / RUN_IDS, ids))

    def _start(self, name: str, config: Config, first_step: int, ids: dict[str, str]) -> None:
        """Start or continue a tracker's run, and record its id in `ids`."""
        resumed = first_step > 0 and name in ids
        if not resumed:
            ids.pop(name, None)
        options = _options(name, config, first_step, ids)
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = tracker_class("tensorboard", str(self._directory), **options)
        elif tracker_class.requires_logging_directory:
            tracker = tracker_class(config.output_dir, str(self._directory), **options)
        else:
            tracker = tracker_class(os.environ.get(PROJECT_VARIABLES.get(name, ""), PROJECT), **options)
        tracker.start()
        self._active[name] = tracker
        if name == "mlflow":
            ids[name] = tracker.tracker.info.run_id
        if name == "tensorboard":  # add_hparams would create another run in TensorBoard at each start
            tracker.log({"config": f"```yaml\n{recipe_yaml(config)}```"}, step=first_step)
        elif not (name == "mlflow" and resumed):  # MLflow refuses to change a parameter
            tracker.store_init_configuration(_flat_config(config))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log the numbers of a step as train/KEY, those of a validation as eval/KEY. Values of None are left out."""
        group = "eval" if "eval_loss" in values else "train"
        numbers = {
            f"{group}/{key.removeprefix('eval_')}": value
            for key, value in values.items()
            if key != "step" and value is not None
        }
        for name, tracker in list(self._active.items()):
            self._attempt(name, "log", lambda tracker=tracker: tracker.log(numbers, step=step))  # type: ignore[misc]

    def finish(self) -> None:
        """Close all trackers."""
        for name, tracker in list(self._active.items()):
            self._attempt(name, "finish", tracker.finish)

    def _attempt(self, name: str, action: str, work: Callable[[], None]) -> None:
        """Call `work`. On failure, print a warning and drop the tracker called `name`, if there is one."""
        try:
            work()
        except (Exception, SystemExit) as error:  # trackers raise anything, and some exit if a login is missing
            self._active.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"warning: {name or RUN_IDS}: cannot {action}: {reason}; training continues without it", flush=True)


def _options(name: str, config: Config, first_step: int, ids: dict[str, str]) -> dict[str, Any]:
    """Return the keyword arguments of a tracker: run name, run id and directory. A new id is added to `ids`."""
    if name == "tensorboard":
        return {"purge_step": first_step + 1}
    if name == "wandb":
        run_id = os.environ.get("WANDB_RUN_ID") or ids.setdefault(name, uuid.uuid4().hex[:8])
        options = {"id": run_id, "resume": "allow", "dir": config.output_dir}
        return options | ({} if "WANDB_NAME" in os.environ else {"name": config.output_dir})
    if name == "mlflow":
        return {"run_name": os.environ.get("MLFLOW_RUN_NAME", config.output_dir), "run_id": ids.get(name)}
    if name == "trackio":  # continues the run of this name
        ids.setdefault(name, f"{Path(config.output_dir).name}-{uuid.uuid4().hex[:8]}")
        return {"name": ids[name], "resume": "allow", "embed": False}
    if name == "comet_ml":  # creates the experiment with this key, or continues it
        return {"experiment_key": ids.setdefault(name, uuid.uuid4().hex)}
    return {"experiment_name": config.output_dir} if name == "swanlab" else {}


def _flat_config(config: Config) -> dict[str, str | int | float | bool | None]:
    """Return the settings by dotted key. Lists and mappings are serialized as JSON."""
    values = {key: value_of(config, key) for key, _ in leaf_fields()}
    scalar = (str, int, float, bool, type(None))
    return {key: value if isinstance(value, scalar) else json.dumps(value) for key, value in values.items()}

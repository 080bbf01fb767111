"""Read the results of runs from their output directories."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.errors import UserError
from pipeline.evaluation.accuracy import accuracy_table, count_unfinished, versions
from pipeline.evaluation.consistency import consistency_tables
from pipeline.evaluation.details import detail_tables
from pipeline.fault_tolerance.restarts import read_restart_log
from pipeline.representations.plots import layers_of
from pipeline.training.metrics_reader import read_metrics, read_validations

MetricHistory = list[dict[str, Any]]  # the metrics of each step, in the order of the steps


@dataclass(frozen=True)
class RunResults:
    """Results of one run.

    Attributes:
        name: name of the run in the report.
        path: output directory of the run.
        metrics: training metrics by step; empty if there are none.
        evaluation: content of evaluation.json, or None if absent.
        representations: content of representations.json, or None if absent.
        config: text of config.yaml, or None if absent.
        starts: start events in starts.jsonl, oldest first.
        validations: validation metrics by step; empty if there are none.
    """

    name: str
    path: Path
    metrics: MetricHistory
    evaluation: dict[str, Any] | None
    representations: dict[str, Any] | None
    config: str | None
    starts: list[dict[str, Any]] = field(default_factory=list)
    validations: MetricHistory = field(default_factory=list)

    @property
    def versions(self) -> dict[str, str]:
        """Package versions recorded with the results, or the installed versions if none were recorded."""
        recorded = (self.evaluation or {}).get("versions") or (self.representations or {}).get("versions")
        return recorded or versions()

    @property
    def evaluated_step(self) -> int | None:
        """Step of the checkpoint that was evaluated, or None if the model is no export or there is no evaluation."""
        export = self.evaluation["model"]["export"] if self.evaluation else None
        return export["step"] if export else None

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as a flat mapping of dotted keys.

        Raises:
            UserError: config.yaml is damaged.
        """
        try:
            tree = yaml.safe_load(self.config) if self.config else None
        except yaml.YAMLError:
            raise UserError(
                f"{self.path}/config.yaml: not YAML; restore it, or remove it to omit its settings"
            ) from None
        return _flatten(tree, "") if isinstance(tree, dict) else {}


def read_runs(paths: list[Path]) -> list[RunResults]:
    """Read the results of several runs.

    A run is identified by its directory name, or by its path as given if two directories have the same name.

    Raises:
        UserError: a directory has no results, or a file is damaged.
    """
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str) -> RunResults:
    """Read the results of one run.

    Raises:
        UserError: the directory has no results, or a file is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; --run takes the output directory of a training run")
    config = path / "config.yaml"
    run = RunResults(
        name,
        path,
        read_metrics(path),
        _read_result(path / "evaluation.json", "pipeline.evaluation", _check_evaluation),
        _read_result(path / "representations.json", "pipeline.representations", _check_representations),
        config.read_text(encoding="utf-8").strip() if config.is_file() else None,
        [event for event in read_restart_log(path) if event["event"] == "start"],
        read_validations(path),
    )
    if not run.metrics and not run.evaluation and not run.representations:
        raise UserError(
            f"{path}: nothing to report: no metrics.jsonl, evaluation.json or representations.json; "
            "train or evaluate first"
        )
    return run


def _read_result(path: Path, program: str, check: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        check(result)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: not a result of {program}; run {program} again") from None
    return result


def _check_evaluation(evaluation: dict[str, Any]) -> None:
    """Access all keys that a report reads, so that a missing key raises an error here."""
    _ = evaluation["model"]["dtype"], (evaluation["model"]["export"] or {"step": None})["step"]
    _ = [evaluation["settings"][key] for key in ("model", "data", "max_new_tokens")]
    accuracy_table(evaluation), count_unfinished(evaluation)
    consistency_tables(evaluation)
    detail_tables(evaluation)


def _check_representations(result: dict[str, Any]) -> None:
    """Access all keys that a report reads, so that a missing key raises an error here."""
    layers_of(result)
    for name in ("final", "soft_tokens"):
        state = result["representations"][name]
        for group in ("similarity", "similarity_zscored"):
            for metric in state[group]["all"].values():
                _ = metric["value"] + metric["floor"]
        _ = state["similarity"]["all"]["debiased_cka"]["interval"], state["variance"]["language"]["interval"]
        _ = state["examples"]["similarity"]["cosine"], result["pair_ids"]
        _ = state["scatter"]["points"], state["separability"]["silhouette"], result["languages"][0], result["position"]


def series(metrics: MetricHistory, key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric, without the steps at which it is absent, null or not finite."""
    points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), int | float) and math.isfinite(m[key])]
    return [step for step, _ in points], [float(value) for _, value in points]


def languages_of(metrics: MetricHistory) -> list[str]:
    """Return the sorted languages whose cross-entropy is in the metrics."""
    return sorted({key.removeprefix("ce_loss_") for values in metrics for key in values if key.startswith("ce_loss_")})


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

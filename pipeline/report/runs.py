"""What a run's directory holds for a report: metrics, evaluation, representations, settings."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.errors import UserError
from pipeline.evaluation.accuracy import accuracy_table, versions
from pipeline.evaluation.consistency import consistency_tables
from pipeline.representations.plots import layers_of
from pipeline.training.metrics_reader import read_metrics

Metrics = list[dict[str, Any]]  # one per step, in order of steps


@dataclass(frozen=True)
class Run:
    """A run under the name it has in the report; what its directory lacks is empty or None."""

    name: str
    path: Path
    metrics: Metrics
    evaluation: dict[str, Any] | None
    representations: dict[str, Any] | None
    config: str | None

    @property
    def versions(self) -> dict[str, str]:
        """Those recorded with its results, else this machine's."""
        recorded = (self.evaluation or {}).get("versions") or (self.representations or {}).get("versions")
        return recorded or versions()

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe with dotted keys."""
        tree = yaml.safe_load(self.config) if self.config else None
        return _flat(tree, "") if isinstance(tree, dict) else {}


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs in their directories, named by these, or by whole paths where two would have one name.

    Raises UserError where there is nothing to report or a file is damaged.
    """
    names = [path.resolve().name for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; --run takes the output directory of a training run")
    config = path / "config.yaml"
    run = Run(
        name,
        path,
        read_metrics(path),
        _read_result(path / "evaluation.json", "pipeline.evaluation", _check_evaluation),
        _read_result(path / "representations.json", "pipeline.representations", _check_representations),
        config.read_text(encoding="utf-8").strip() if config.is_file() else None,
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
        raise UserError(f"{path}: not a result of {program}; run that again") from None
    return result


def _check_evaluation(evaluation: dict[str, Any]) -> None:
    """Whatever a report reads must be there."""
    accuracy_table(evaluation)
    consistency_tables(evaluation)


def _check_representations(result: dict[str, Any]) -> None:
    layers_of(result)
    for name in ("final", "soft_tokens"):
        found = result["representations"][name]
        for figure in found["similarity"]["all"].values():
            _ = figure["value"] + figure["floor"]
        _ = found["scatter"]["points"], found["separability"]["silhouette"], result["languages"][0]


def series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, without the steps at which it is absent, null or not finite."""
    points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), int | float) and math.isfinite(m[key])]
    return [step for step, _ in points], [float(value) for _, value in points]


def languages_of(metrics: Metrics) -> list[str]:
    """Languages whose cross-entropy was recorded."""
    return sorted({key.removeprefix("ce_loss_") for values in metrics for key in values if key.startswith("ce_loss_")})


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

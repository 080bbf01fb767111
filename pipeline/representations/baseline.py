"""Differences of the representations of two models on the same problems, with paired intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.representations.intervals import Bootstrap
from pipeline.representations.tables import MAIN_METRICS


def differences_from(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Compare a result with that of another model.

    Args:
        path: directory with the `representations.json` of the other model.
        result: the result; must cover the same problems and languages at the same position.

    Returns:
        `name`, and `differences`: for each representation of both the differences of the main metrics, with intervals
        of the bootstrap over problems, paired by problem.

    Raises:
        UserError: the file is missing or malformed, or has other problems.
    """
    file = path / "representations.json" if path.is_dir() else path
    try:
        other = json.loads(file.read_text("utf-8"))
        states = {name: state for name, state in other["representations"].items() if name in result["representations"]}
        mismatched = [key for key in ("position", "languages", "pair_ids") if other[key] != result[key]]
        examples = {name: metrics["examples"] for name, metrics in states.items()}
    except OSError as error:
        raise UserError(f"--baseline {file}: {error.strerror}; first measure that model") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--baseline {file}: not a result of this version; measure that model again") from None
    if mismatched:
        raise UserError(f"--baseline {file}: has another {mismatched[0]}; measure both models on the same data")
    bootstrap = Bootstrap(result["problems"])
    return {
        "name": str(path),
        "differences": {
            name: _differences(result["representations"][name]["examples"], examples[name], bootstrap)
            for name in states
        },
    }


def _differences(candidate: dict[str, Any], baseline: dict[str, Any], bootstrap: Bootstrap) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {}
    for group, metric, _ in MAIN_METRICS:
        difference = paired_difference(candidate[group][metric], baseline[group][metric], bootstrap)
        table.setdefault(group, {})[metric] = difference
    return table


def paired_difference(candidate: Sequence[float], baseline: Sequence[float], bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the difference of a metric between two models, with its interval.

    Args:
        candidate: [G] per-example values of the metric, in the order of the problems.
        baseline: [G] the same of the other model.
        bootstrap: the resamples of G problems.

    Returns:
        `value`, candidate minus baseline, and its `interval`.
    """
    difference = np.subtract(candidate, baseline)
    return {"value": float(difference.mean()), "interval": bootstrap.interval(difference)}

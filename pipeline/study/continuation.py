"""What may change when a study is continued: anything that does not mix results of different settings."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.fault_tolerance.restarts import read_restart_log
from pipeline.study.settings import CHOICES, CHOICES_FILE, SETTINGS_FILE, StudySettings

# Settings that may always change, and settings that may change until there are results made with them. All others, the
# primary measure in particular, are fixed when the study begins.
MAY_CHANGE = ("output", "variants", "seeds", "answers")
MAY_CHANGE_WITHOUT_RESULTS = ("prepare_args", "train_args", "evaluate_args")


def continue_study(study: StudySettings, recorded: dict[str, Any], hashes: dict[str, str]) -> StudySettings:
    """Return the study with the recorded variants and seeds added.

    Args:
        study: settings of this call.
        recorded: those in the output directory.
        hashes: SHA-256 of the files whose content must not change.

    Raises:
        UserError: a setting that may not change, or the content of a file, differs from the recorded one.
    """
    current = json.loads(json.dumps({**asdict(study), "sha256": hashes}))
    for key in [key for key in current if key not in MAY_CHANGE and current[key] != recorded.get(key)]:
        name, values = key, f" ({recorded.get(key)!r}, now {current[key]!r})"
        if key == "sha256":
            name, values = "content of the test or development records", ""
        message = f"{study.root / SETTINGS_FILE}: the study began with another {name}{values}"
        if key not in MAY_CHANGE_WITHOUT_RESULTS:
            raise UserError(f"{message}; give another --output")
        if results := results_of(study, key):
            raise UserError(f"{message}; give another --output, or remove what was made with it: {' '.join(results)}")
    names = tuple(dict.fromkeys([*recorded["variants"], *study.variants]))
    return replace(study, variants=names, seeds=tuple(dict.fromkeys([*recorded["seeds"], *study.seeds])))


def results_of(study: StudySettings, arguments: str) -> list[str]:
    """Return the paths of all results of a study that depend on `prepare_args`, `train_args` or `evaluate_args`.

    The packer and the evaluation start again by themselves if their arguments have changed. A training run resumes from
    its checkpoint with the changed ones, so its checkpoints are results too.
    """
    root, found = study.root, []
    if arguments == "prepare_args":
        found += [path.parent for path in root.glob("shards-*/manifest.json")]
        found += root.glob("weights.safetensors")
    if arguments == "evaluate_args":
        found += root.glob("*/evaluation.json")
    else:
        found += filter(_has_results, [*root.glob("*-seed*"), *root.glob("*-trial*")])
    if (root / CHOICES / CHOICES_FILE).is_file():
        found.append(root / CHOICES)
    return sorted(map(str, found))


def is_trained(run: Path) -> bool:
    """Return whether a training run has ended successfully."""
    ends = [event for event in read_restart_log(run) if event["event"] in ("start", "end")]
    return bool(ends) and ends[-1].get("status") == 0


def _has_results(run: Path) -> bool:
    return is_trained(run) or (run / "evaluation.json").is_file() or any(run.glob("checkpoint-*"))

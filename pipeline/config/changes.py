"""Compare the settings of a checkpoint with those of the run that resumes from it."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml

from pipeline.config.fields import leaf_fields, value_of
from pipeline.config.settings import Config

# Settings that are newer than some checkpoints, with the value that corresponds to the code before them. It may differ
# from the default.
VALUES_BEFORE: dict[str, Any] = {
    "loss.top_k": None,
    "training.embedding_learning_rate": None,
    "training.export_at_end": False,
}


@dataclass(frozen=True)
class Change:
    """Setting with another value than in the checkpoint.

    Attributes:
        key: dotted key.
        before, after: JSON values in the checkpoint and now.
        rule: `on_resume` in the metadata of the field: None if the setting must not change.
    """

    key: str
    before: Any
    after: Any
    rule: str | None

    def __str__(self) -> str:
        return f"{self.key} {json.dumps(self.before)} -> {json.dumps(self.after)}"


def saved_config(recipe: str) -> Config:
    """Return the settings of a checkpoint. Keys that its recipe lacks have the value of `VALUES_BEFORE` or the default.

    Args:
        recipe: the config.yaml of the checkpoint. Keys that no longer exist are ignored.
    """
    return _build(Config, yaml.safe_load(recipe) or {}, "")


def _build(cls: Any, tree: dict[str, Any], prefix: str) -> Any:
    hints, values = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _build(hints[field.name], tree.get(field.name) or {}, f"{key}.")
        elif field.name in tree:
            value = tree[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif key in VALUES_BEFORE:
            values[field.name] = VALUES_BEFORE[key]
    return cls(**values)


def changed_settings(before: Config, after: Config) -> list[Change]:
    """Return the settings that differ, in the order of the settings."""
    changes = []
    for key, field in leaf_fields():
        old, new = (json.loads(json.dumps(value_of(config, key))) for config in (before, after))
        if old != new:
            changes.append(Change(key, old, new, field.metadata.get("on_resume")))
    return changes

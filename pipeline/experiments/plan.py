"""What decides the experiment: arms, amounts of data, sizes, seeds; a YAML file that is fixed before the run."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.loss import LossSettings

BASELINE = "sft"


@dataclass(frozen=True)
class ModelSize:
    """Of the Qwen3 model that is trained from random weights."""

    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Arm:
    """What one arm adds to plain supervised fine-tuning.

    Attributes:
        loss: the SOLAR loss; null is plain fine-tuning. idf: vocabulary weights are inverse document frequencies.
        middle: weight of the rival term on a middle layer. dictionary: weight of the oracle.
        shuffle: pairs are made between different problems. amounts: at which this arm runs; null: at all.
    """

    loss: LossSettings | None = None
    idf: bool = False
    middle: float = 0.0
    dictionary: float = 0.0
    shuffle: bool = False
    amounts: list[int] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the experiment, fixed in a file before it runs.

    Attributes:
        arms: by name; `sft` is what the others are compared with. amounts: pairs per low-resource language.
        mid_problems: problems with both mid-resource languages in the fine-tuning data.
        test_problems: per language and kind of cells.
    """

    arms: dict[str, Arm]
    amounts: list[int]
    seeds: list[int]
    pretraining: TrainingSettings
    finetuning: TrainingSettings
    model: ModelSize = field(default_factory=ModelSize)
    mid_problems: int = 100
    test_problems: int = 100


def _check_arms(tree: Any) -> None:
    """In a mapping of dataclasses jsonargparse passes over unknown keys. Raises ValueError."""
    known = [f.name for f in fields(Arm)]
    for name, arm in (tree["arms"] if isinstance(tree, dict) and isinstance(tree.get("arms"), dict) else {}).items():
        if not isinstance(arm, dict) or not set(arm) <= set(known):
            raise ValueError(f"arm {name!r} must be a mapping of some of {', '.join(known)}")


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises UserError for an unreadable file, an unknown key, a value of a wrong type, or a plan without `sft`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan, "plan")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_arms(tree)
        plan: Plan = parser.instantiate_classes(parser.parse_object({"plan": tree})).plan
    except OSError as error:
        raise UserError(f"{path}: cannot read the plan ({error.strerror}); give one with --plan") from None
    except (yaml.YAMLError, UnicodeDecodeError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a plan: {' '.join(str(error).replace('plan.', '').split())}") from None
    if BASELINE not in plan.arms:
        raise UserError(f"{path}: no arm {BASELINE!r}, with which the others are compared; add it")
    if not plan.seeds or not plan.amounts or min(plan.amounts) < 1 or not plan.finetuning.max_steps:
        raise UserError(
            f"{path}: seeds and amounts must be given, amounts at least 1, and max_steps for both trainings"
        )
    return plan

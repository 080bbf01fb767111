"""Plan of an experiment: variants, data sizes and seeds. It is read from a YAML file that is fixed before the run."""

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
    """Size of the Qwen3 model, which is trained from random weights."""

    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Variant:
    """Changes that a variant makes to plain supervised fine-tuning.

    Attributes:
        loss: the SOLAR loss; None for plain fine-tuning.
        idf: whether to use inverse document frequencies as vocabulary weights.
        middle: weight of the middle-layer loss.
        dictionary: weight of the dictionary loss.
        shuffle: whether to pair translations with pivots of other problems.
        amounts: numbers of low-resource pairs for which this variant runs; None for all of the plan's.
    """

    loss: LossSettings | None = None
    idf: bool = False
    middle: float = 0.0
    dictionary: float = 0.0
    shuffle: bool = False
    amounts: list[int] | None = None


@dataclass(frozen=True)
class ExperimentPlan:
    """Everything that determines the results of an experiment.

    Attributes:
        arms: the variants by name. `sft` is the baseline.
        amounts: numbers of pairs per low-resource language in the fine-tuning data, with one series of runs for each.
        seeds: random seeds of the benchmark and the training.
        pretraining: training of the base model.
        finetuning: training of each variant.
        model: size of the model.
        mid_problems: number of problems in the fine-tuning data that are in both mid-resource languages.
        test_problems: number of test problems per language. Low-resource languages have this number of seen and of
            unseen combinations each.
    """

    arms: dict[str, Variant]
    amounts: list[int]
    seeds: list[int]
    pretraining: TrainingSettings
    finetuning: TrainingSettings
    model: ModelSize = field(default_factory=ModelSize)
    mid_problems: int = 100
    test_problems: int = 100

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants by name. Their key in the file is `arms`."""
        return self.arms


def _check_variants(tree: Any) -> None:
    """Raise ValueError for unknown keys, which jsonargparse ignores in a mapping of dataclasses."""
    known = [f.name for f in fields(Variant)]
    variants = tree["arms"] if isinstance(tree, dict) and isinstance(tree.get("arms"), dict) else {}
    for name, variant in variants.items():
        if not isinstance(variant, dict) or not set(variant) <= set(known):
            raise ValueError(f"arms.{name} must be a mapping with keys among {', '.join(known)}")


def read_experiment_plan(path: Path) -> ExperimentPlan:
    """Read a plan from a YAML file.

    Raises:
        UserError: the file is unreadable, has an unknown key or a value of the wrong type, or has no variant `sft`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ExperimentPlan, "plan")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_variants(tree)
        plan: ExperimentPlan = parser.instantiate_classes(parser.parse_object({"plan": tree})).plan
    except OSError as error:
        raise UserError(f"{path}: cannot read the plan ({error.strerror}); pass a readable file with --plan") from None
    except (yaml.YAMLError, UnicodeDecodeError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: invalid plan: {' '.join(str(error).replace('plan.', '').split())}") from None
    if BASELINE not in plan.variants:
        raise UserError(f"{path}: arms has no {BASELINE!r}, which is the baseline; add it")
    if not plan.seeds or not plan.amounts or min(plan.amounts) < 1:
        raise UserError(f"{path}: seeds and amounts must not be empty, and amounts must be at least 1")
    if not plan.pretraining.max_steps or not plan.finetuning.max_steps:
        raise UserError(f"{path}: set max_steps in pretraining and in finetuning")
    return plan

"""Plan of an experiment: worlds, variants and seeds. It is read from a YAML file that is fixed before the run."""

import argparse
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.experiments.synthetic_benchmark import BenchmarkOptions
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
class World:
    """One setting of the benchmark, the model and the data, in which variants are compared.

    Attributes:
        benchmark: options of the synthetic benchmark.
        pairs: number of pairs per low-resource language in the fine-tuning data.
        model: size of the model; None for that of the plan.
        embedding_rate: learning rate of the input embedding in fine-tuning, as a factor of the learning rate.
        max_seeds: number of seeds to run, the first ones of the plan; None for all.
    """

    benchmark: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    pairs: int = 60
    model: ModelSize | None = None
    embedding_rate: float = 1.0
    max_seeds: int | None = None


@dataclass(frozen=True)
class MiddleLayer:
    """Alignment of the mean hidden states of a layer.

    Attributes:
        weight: factor of the loss.
        layer: number of the layer, counted from 1.
        temperature: divisor of the cosines of a contrastive loss with gradients to both sides; None for 1 - cosine with
            detached pivots.
        alternate: whether every other step trains this loss alone and the remaining ones the cross entropy alone.
    """

    weight: float
    layer: int
    temperature: float | None = None
    alternate: bool = False


@dataclass(frozen=True)
class Variant:
    """Changes that a variant makes to plain supervised fine-tuning.

    Attributes:
        loss: the SOLAR loss; None for plain fine-tuning.
        idf: whether to use inverse document frequencies as vocabulary weights.
        hard: weight of a second alignment, of the target tokens' embeddings, with the vocabulary weights of `idf`
            whether or not `loss` has them.
        middle: alignment of a middle layer, or None.
        dictionary: weight of the dictionary loss.
        translation_steps: number of steps before fine-tuning that train the translation of the questions of all pairs
            into the pivot.
        shuffle: whether to pair translations with pivots of other problems.
        family: in a screening, the family whose trial this is. In a final plan, the family whose best trial in the
            screening gives all other fields.
        worlds: names of the worlds in which the variant runs; None for all.
    """

    loss: LossSettings | None = None
    idf: bool = False
    hard: float = 0.0
    middle: MiddleLayer | None = None
    dictionary: float = 0.0
    translation_steps: int = 0
    shuffle: bool = False
    family: str | None = None
    worlds: list[str] | None = None


@dataclass(frozen=True)
class Contrast:
    """A difference between two variants in one world, fixed before the run."""

    variant: str
    baseline: str
    world: str


@dataclass(frozen=True)
class ExperimentPlan:
    """Everything that determines the results of an experiment.

    Attributes:
        arms: the variants by name. `sft` is the baseline.
        worlds: the worlds by name.
        seeds: random seeds of the benchmark and the training.
        pretraining: training of the base model.
        finetuning: training of each variant.
        model: size of the model.
        mid_problems: number of problems in the fine-tuning data that are in both mid-resource languages.
        test_problems: number of test problems per language. Low-resource languages have this number of seen and of
            unseen combinations each.
        primary: contrasts of the primary measure that are tested first; see `analysis.py`.
        chosen: file with the outcome of a screening, relative to the plan. Variants with a family take their settings
            from it, and it limits the number of seeds. None in a screening.
    """

    arms: dict[str, Variant]
    worlds: dict[str, World]
    seeds: list[int]
    pretraining: TrainingSettings
    finetuning: TrainingSettings
    model: ModelSize = field(default_factory=ModelSize)
    mid_problems: int = 100
    test_problems: int = 100
    primary: list[Contrast] = field(default_factory=list)
    chosen: str | None = None

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants by name. Their key in the file is `arms`."""
        return self.arms

    def seeds_of(self, world: str) -> list[int]:
        """Return the seeds that run in a world."""
        return self.seeds[: self.worlds[world].max_seeds]

    def variants_of(self, world: str) -> dict[str, Variant]:
        """Return the variants that run in a world."""
        return {name: v for name, v in self.arms.items() if v.worlds is None or world in v.worlds}

    def model_of(self, world: str) -> ModelSize:
        """Return the size of the model in a world."""
        return self.worlds[world].model or self.model

    def base_of(self, world: str) -> str:
        """Return the name of the base model of a world: the first world with the same benchmark and model size."""
        key = self.worlds[world].benchmark, self.model_of(world)
        return next(name for name, other in self.worlds.items() if (other.benchmark, self.model_of(name)) == key)

    def finetuning_of(self, world: str) -> TrainingSettings:
        """Return the fine-tuning settings in a world."""
        factor = self.worlds[world].embedding_rate
        if factor == 1:
            return self.finetuning
        return replace(self.finetuning, embedding_learning_rate=factor * self.finetuning.learning_rate)


def check_keys(tree: Any, section: str, cls: type) -> None:
    """Raise ValueError for unknown keys, which jsonargparse ignores in a mapping of dataclasses."""
    known = [f.name for f in fields(cls)]
    entries = tree.get(section) if isinstance(tree, dict) else None
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(entry, dict) or not set(entry) <= set(known):
            raise ValueError(f"{section}.{name} must be a mapping with keys among {', '.join(known)}")


def read_experiment_plan(path: Path) -> ExperimentPlan:
    """Read a plan from a YAML file.

    Raises:
        UserError: the file is unreadable, has an unknown key or a value of the wrong type, or has no variant `sft`.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ExperimentPlan, "plan")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_keys(tree, "arms", Variant)
        check_keys(tree, "worlds", World)
        plan: ExperimentPlan = parser.instantiate_classes(parser.parse_object({"plan": tree})).plan
    except OSError as error:
        raise UserError(f"{path}: cannot read the plan ({error.strerror}); pass a readable file with --plan") from None
    except (yaml.YAMLError, UnicodeDecodeError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: invalid plan: {' '.join(str(error).replace('plan.', '').split())}") from None
    _check_plan(path, plan)
    return plan


def _check_plan(path: Path, plan: ExperimentPlan) -> None:
    """Raise UserError if the parts of a plan do not fit together."""
    if BASELINE not in plan.variants:
        raise UserError(f"{path}: arms has no {BASELINE!r}, which is the baseline; add it")
    if not plan.seeds or not plan.worlds:
        raise UserError(f"{path}: seeds and worlds must not be empty")
    for name, world in plan.worlds.items():
        if world.pairs < 1:
            raise UserError(f"{path}: worlds.{name}.pairs must be at least 1")
    for name, variant in plan.variants.items():
        if unknown := set(variant.worlds or []) - set(plan.worlds):
            raise UserError(f"{path}: arms.{name}.worlds has {sorted(unknown)}, which are not in worlds")
        if variant.middle and any(
            not 1 <= variant.middle.layer <= plan.model_of(w).num_hidden_layers
            for w in plan.worlds
            if name in plan.variants_of(w)
        ):
            raise UserError(f"{path}: arms.{name}.middle.layer is not a layer of the model")
    for contrast in plan.primary:
        if contrast.world not in plan.worlds or not {contrast.variant, contrast.baseline} <= set(
            plan.variants_of(contrast.world)
        ):
            raise UserError(
                f"{path}: primary has {contrast}, which names a variant or world that the plan does not run"
            )
    if not plan.pretraining.max_steps or not plan.finetuning.max_steps:
        raise UserError(f"{path}: set max_steps in pretraining and in finetuning")


def resolve_plan(plan: ExperimentPlan, seeds: int, families: dict[str, Variant]) -> ExperimentPlan:
    """Replace each variant that names a family by the family's chosen trial, and limit the number of seeds.

    Args:
        plan: a final plan.
        seeds: maximum number of seeds.
        families: chosen variants by family, see `screening.read_chosen`.

    Raises:
        UserError: a family has no chosen trial.
    """
    arms = {}
    for name, variant in plan.arms.items():
        arms[name] = variant
        if variant.family is not None:
            if variant.family not in families:
                raise UserError(f"arms.{name}: the screening has not chosen a trial of the family {variant.family!r}")
            trial = families[variant.family]
            arms[name] = replace(
                trial, family=variant.family, worlds=variant.worlds, shuffle=variant.shuffle or trial.shuffle
            )
    return replace(plan, arms=arms, seeds=plan.seeds[:seeds])

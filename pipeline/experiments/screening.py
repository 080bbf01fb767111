"""Choose the best trial of each family of variants from a screening, and the number of seeds of the final run.

A screening plan gives every trial a `family`. All families have the same number of trials on the same seeds. A final
plan refers to a family, and the chosen trial's settings replace the reference.
"""

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import yaml
from jsonargparse import ArgumentParser

from pipeline.common.errors import UserError
from pipeline.experiments.analysis import PRIMARY, Results, differences, seeds_needed
from pipeline.experiments.plan import BASELINE, Contrast, ExperimentPlan, Variant, check_keys

MAX_FOREIGN_WORDS = 0.005  # a trial may exceed the baseline's fraction of outputs with foreign words by this much


@dataclass(frozen=True)
class Trial:
    """Mean differences of a trial from the baseline over the screening seeds.

    Attributes:
        name, family: the variant and its family.
        gain: difference of the primary measure.
        deviation: its standard deviation over seeds.
        foreign_words: difference of the fraction of outputs with foreign words.
        chosen: whether it is the chosen trial of its family.
    """

    name: str
    family: str
    gain: float
    deviation: float
    foreign_words: float
    chosen: bool = False


@dataclass(frozen=True)
class Chosen:
    """Outcome of a screening.

    Attributes:
        seeds: number of seeds that find 5 points of the primary measure with 80 % power, from the largest standard
            deviation among the chosen trials.
        families: the chosen variant of each family.
    """

    seeds: int
    families: dict[str, Variant]


def judge_trials(plan: ExperimentPlan, results: Results, world: str) -> list[Trial]:
    """Return the trials that have results of at least two seeds.

    In each family, choose the largest gain among the trials that add at most MAX_FOREIGN_WORDS to the baseline's
    foreign words. If there is none, choose the trial that adds the fewest.
    """
    trials = []
    for name, variant in plan.variants_of(world).items():
        contrast = Contrast(name, BASELINE, world)
        if variant.family is None or len(gains := differences(results, contrast, PRIMARY)) < 2:
            continue
        foreign_words = fmean(differences(results, contrast, "confusion"))
        trials.append(Trial(name, variant.family, fmean(gains), stdev(gains), foreign_words))
    chosen = {_best([t for t in trials if t.family == family]).name for family in {t.family for t in trials}}
    return [Trial(**{**asdict(trial), "chosen": trial.name in chosen}) for trial in trials]


def _best(trials: Sequence[Trial]) -> Trial:
    if eligible := [trial for trial in trials if trial.foreign_words <= MAX_FOREIGN_WORDS]:
        return max(eligible, key=lambda trial: trial.gain)
    return min(trials, key=lambda trial: trial.foreign_words)


def screening_table(trials: Sequence[Trial]) -> str:
    """Format the trials as Markdown, in points."""
    lines = [
        "| family | trial | held-out combinations | SD over seeds | foreign words | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for trial in trials:
        numbers = f"{100 * trial.gain:+.1f} | {100 * trial.deviation:.1f} | {100 * trial.foreign_words:+.1f}"
        lines.append(f"| {trial.family} | {trial.name} | {numbers} | {'chosen' if trial.chosen else ''} |")
    return "\n".join(lines)


def chosen_yaml(plan: ExperimentPlan, trials: Sequence[Trial]) -> str:
    """Return the content of chosen.yaml, which `read_chosen` reads."""
    chosen = [trial for trial in trials if trial.chosen]
    families = {}
    for trial in chosen:
        fields = asdict(plan.arms[trial.name]) | {"family": None, "worlds": None}
        families[trial.family] = {key: _plain(value) for key, value in fields.items() if value}
    return yaml.safe_dump(
        {"seeds": seeds_needed(max(trial.deviation for trial in chosen)), "families": families}, sort_keys=False
    )


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_chosen(path: Path) -> Chosen:
    """Read the outcome of a screening.

    Raises:
        UserError: there is no such file, or it is invalid.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; run the screening (make screening) and copy its chosen.yaml there")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Chosen, "chosen")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_keys(tree, "families", Variant)
        result: Chosen = parser.instantiate_classes(parser.parse_object({"chosen": tree})).chosen
    except (yaml.YAMLError, UnicodeDecodeError, ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: invalid outcome of a screening: {' '.join(str(error).split())}") from None
    return result

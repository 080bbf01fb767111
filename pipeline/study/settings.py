"""Settings of a study, and the names of its directories."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import read_json_or_none
from pipeline.common.errors import UserError

SETTINGS_FILE = "study.json"  # in the output directory
RESULTS_FILE = "results.json"  # likewise
CHOICES = "choices"  # directory of the settings that the trials have selected
CHOICES_FILE = "choices.json"  # in that directory


@dataclass(frozen=True)
class StudySettings:
    """Everything that defines a study. Paths are those of the command line.

    Attributes:
        output: directory of the study.
        model: Hugging Face directory of the model that all variants start from; None: the recipe builds a model with
            random weights (`model.config`), and no base is evaluated.
        recipe: the recipe that the variants change.
        train: canonical records to train on.
        test: records of the test split.
        dev: records of the development split, on which trials choose one setting of each variant; None: no trials.
        answers: records with worked answers, on which representations are measured; None: they are not.
        variants: names in variants.yaml.
        seeds: training seeds.
        primary: the measure that decides, for `pipeline.compare`.
        prepare_args, train_args, evaluate_args: arguments for all variants, split at whitespace as in slurm/chain.sh:
            quotes are ordinary characters.
    """

    output: str
    model: str | None
    recipe: str
    train: tuple[str, ...]
    test: str
    dev: str | None
    answers: str | None
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    primary: tuple[str, ...]
    prepare_args: str = ""
    train_args: str = ""
    evaluate_args: str = ""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "StudySettings":
        """Return settings whose lists are tuples."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    @property
    def root(self) -> Path:
        """The output directory."""
        return Path(self.output)

    @property
    def base(self) -> Path | None:
        """The directory of the results of the model before training, or None if its weights are random."""
        return self.root / "base" if self.model else None

    @property
    def report(self) -> Path:
        """The directory of the report."""
        return self.root / "report"

    def evaluated_runs(self) -> list[Path]:
        """Return the directories of all results on the test split, that of the base first."""
        runs = [self.run(name, seed) for name in self.variants for seed in self.seeds]
        return [self.base, *runs] if self.base else runs

    def run(self, variant: str, seed: int) -> Path:
        """Return the output directory of a training run."""
        return self.root / f"{variant}-seed{seed}"

    def trial(self, variant: str, number: int) -> Path:
        """Return the output directory of a trial, from 1."""
        return self.root / f"{variant}-trial{number}"

    def choice(self, variant: str) -> Path:
        """Return the file of further arguments of a variant, one a line, which `choose` writes."""
        return self.root / CHOICES / f"{variant}.args"


def read_study(output: Path) -> StudySettings:
    """Return the recorded settings of a study.

    Raises:
        UserError: the directory has none.
    """
    recorded = read_json_or_none(output / SETTINGS_FILE)
    if recorded is None:
        raise UserError(f"{output}: no {SETTINGS_FILE}; python -m pipeline.study or slurm/experiment.sh begins a study")
    recorded.pop("sha256")
    return StudySettings.from_values(recorded)

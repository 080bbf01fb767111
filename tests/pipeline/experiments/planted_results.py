"""Write metrics of models that were never trained, as `Study` would."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.experiments.analysis import TESTED
from pipeline.experiments.plan import ExperimentPlan
from pipeline.experiments.results import MECHANISM_HEADINGS


def plant(output: Path, variant: str, seed: int, world: str = "main", **metrics: Any) -> None:
    """Write the metrics of one model: 0.5 each, unless given."""
    directory = output / f"seed-{seed}" / world
    directory.mkdir(parents=True, exist_ok=True)
    values = dict.fromkeys([*TESTED, *MECHANISM_HEADINGS, "floor"], 0.5) | metrics
    values |= {"arm": variant, "world": world, "seed": seed}
    (directory / f"{variant}.json").write_text(json.dumps(values))


def plant_all(plan: ExperimentPlan, output: Path) -> None:
    """Write random metrics of every model of a plan. Variants differ in their means, and seeds differ too."""
    rng = np.random.default_rng(0)
    for world in plan.worlds:
        for seed in plan.seeds_of(world):
            level = rng.normal(0.5, 0.1)
            for index, variant in enumerate(plan.variants_of(world)):
                metrics = {name: float(level + 0.01 * index + rng.normal(0, 0.05)) for name in TESTED}
                plant(output, variant, seed, world, **metrics)

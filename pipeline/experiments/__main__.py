"""Run an experiment: all seeds of its plan, in parallel on all GPUs or CPU cores. Then write the tables.

    python -m pipeline.experiments                      # all of pipeline/experiments/plan.yaml, into runs/experiment
    python -m pipeline.experiments --seeds '[100]'      # one seed, e.g. as a task of a Slurm array; no tables
    python -m pipeline.experiments --variants '[sft, hard]'             # some variants; another call trains the others

A restart skips models that already have results. Once all models have results, the tables are written.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from transformers.utils.logging import disable_progress_bar

from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.experiments.plan import ExperimentPlan, read_experiment_plan, resolve_plan
from pipeline.experiments.results import write_experiment_results
from pipeline.experiments.screening import read_chosen
from pipeline.experiments.study import Study

PLAN = Path(__file__).parent / "plan.yaml"
# glibc returns large blocks to the system when they are freed. To keep them, and to take memory in large pieces, saves
# page faults in every operation.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclass(frozen=True)
class ExperimentSettings:
    """Settings of an experiment run.

    Args:
        plan: YAML file with the variants, worlds, seeds and sizes.
        output: directory for base models, metrics and tables.
        seeds: subset of the plan's seeds; default: all.
        worlds: subset of the plan's worlds; default: all.
        variants: subset of the plan's variants to train; default: all.
        processes: number of seeds to run at once; default: the number of GPUs or, without GPUs, of CPU cores.
    """

    plan: str = str(PLAN)
    output: str = "runs/experiment"
    seeds: list[int] | None = None
    worlds: list[str] | None = None
    variants: list[str] | None = None
    processes: PositiveInt | None = None


def save_plan(plan: ExperimentPlan, output: Path) -> None:
    """Write the plan next to its results. Seeds, worlds and variants may be added to a saved plan.

    A saved plan that lacks an option was written before this option existed, so it had the default.

    Raises:
        UserError: the directory has results of a plan that differs in any other way.
    """
    ensure_writable(output)
    path, new = output / "plan.yaml", _to_plain(asdict(plan))
    saved = _to_plain(asdict(read_experiment_plan(path))) if path.exists() else new
    merged = {key: saved[key] | new[key] for key in ("arms", "worlds")}
    changed = {key for key in new if key not in ("arms", "worlds", "seeds", "primary") and new[key] != saved[key]}
    for key in merged:
        changed |= {f"{key}.{name}" for name in saved[key] if merged[key][name] != saved[key][name]}
    if changed:
        raise UserError(
            f"{output}: has results of a different plan, which differs in {', '.join(sorted(changed))}; "
            "give another --output"
        )
    text = yaml.safe_dump(new | merged, sort_keys=False)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # avoid rewriting it in the process of each seed
        write_atomically(path, text.encode())


def _to_plain(value: Any) -> Any:
    """Convert tuples to lists, as in a plan read from YAML."""
    if isinstance(value, dict):
        return {key: _to_plain(v) for key, v in value.items()}
    return [_to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def run_seeds(settings: ExperimentSettings, seeds: list[int], world: str) -> None:
    """Run each seed in one world in a separate process.

    Raises:
        UserError: a seed failed. The other seeds finish first.
    """
    gpus = torch.cuda.device_count()
    processes = settings.processes or gpus or os.cpu_count() or 1

    def run(item: tuple[int, int]) -> int:
        index, seed = item
        environment = KEEP_FREED_MEMORY | os.environ
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus)[index % gpus]
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        args = f"--seeds [{seed}] --worlds [{world}]".split()
        args += ["--plan", settings.plan, "--output", settings.output]
        args += [f"--variants=[{','.join(settings.variants)}]"] if settings.variants else []
        return subprocess.run([sys.executable, "-m", "pipeline.experiments", *args], env=environment).returncode

    with ThreadPoolExecutor(processes) as pool:
        statuses = list(pool.map(run, enumerate(seeds)))
    failed = [str(seed) for seed, status in zip(seeds, statuses, strict=True) if status]
    if failed:
        raise UserError(f"seeds {', '.join(failed)} failed, see above; run the same command again to resume")


def visible_gpus(count: int) -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES selects each of the `count` GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]


def main() -> None:
    """Run the command line. The options are the fields of `ExperimentSettings`."""
    disable_progress_bar()  # for loading and saving small models
    settings: ExperimentSettings = auto_cli(ExperimentSettings, as_positional=False)
    plan, output = read_experiment_plan(Path(settings.plan)), Path(settings.output)
    if plan.chosen is not None:
        chosen = read_chosen(Path(settings.plan).parent / plan.chosen)
        plan = resolve_plan(plan, chosen.seeds, chosen.families)
    seeds, worlds = settings.seeds or plan.seeds, settings.worlds or list(plan.worlds)
    variants = settings.variants or list(plan.variants)
    options = (("seeds", seeds, plan.seeds), ("worlds", worlds, list(plan.worlds)))
    for name, requested, planned in (*options, ("variants", variants, list(plan.variants))):
        if unknown := sorted(set(requested) - set(planned)):  # type: ignore[type-var]
            raise UserError(f"--{name} {unknown} are not in {settings.plan}, which has {planned}")
    save_plan(plan, output)
    if len(seeds) == 1:
        part = replace(plan, arms={name: plan.variants[name] for name in variants})
        for world in worlds:
            if seeds[0] in plan.seeds_of(world):
                Study(part, world, seeds[0], output).run(lambda text: print(text, flush=True))
        return
    for world in worlds:  # finish one world for all seeds before the next one
        run_seeds(settings, [seed for seed in seeds if seed in plan.seeds_of(world)], world)
    print(write_experiment_results(plan, output), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)

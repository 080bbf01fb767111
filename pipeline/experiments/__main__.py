"""Run the experiment: every seed of the plan, as many at once as there are GPUs (or cores), then the tables.

    python -m pipeline.experiments                      # all of pipeline/experiments/plan.yaml, into runs/experiment
    python -m pipeline.experiments --seeds '[100]'      # one seed, as a task of a Slurm array; no tables yet

Started again, it goes on with what is missing; with nothing missing it writes the tables.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from transformers.utils.logging import disable_progress_bar

from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.experiments.plan import Plan, read_plan
from pipeline.experiments.results import write_results
from pipeline.experiments.study import Study

PLAN = Path(__file__).parent / "plan.yaml"


@dataclass(frozen=True)
class Settings:
    """What to run and where.

    Args:
        plan: YAML file with arms, amounts, seeds and sizes.
        output: directory of bases, figures and tables.
        seeds: some of the plan's seeds; all of them if not given.
        amounts: some of the plan's amounts of low-resource pairs; all of them if not given.
        processes: seeds that run at once; as many as GPUs, or cores, if not given.
    """

    plan: str = str(PLAN)
    output: str = "runs/experiment"
    seeds: list[int] | None = None
    amounts: list[int] | None = None
    processes: PositiveInt | None = None


def fix_plan(plan: Plan, output: Path) -> None:
    """Keep the plan beside its results. Seeds, amounts and arms may be added later, nothing else may change.

    Raises UserError where results of another plan are there.
    """
    ensure_writable(output)
    path, told = output / "plan.yaml", _plain(asdict(plan))
    kept = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else told
    arms = kept["arms"] | told["arms"]
    other = {key for key in told if key not in ("arms", "seeds", "amounts") and told[key] != kept[key]}
    other |= {f"arms.{name}" for name in told["arms"] if arms[name] != kept["arms"].get(name, arms[name])}
    if other:
        raise UserError(
            f"{output}: holds results of another plan (other: {', '.join(sorted(other))}); give another --output"
        )
    text = yaml.safe_dump(told | {"arms": arms}, sort_keys=False)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # seeds that run at once leave it alone
        write_atomically(path, text.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def run_seeds(settings: Settings, seeds: list[int], amount: int) -> None:
    """Each seed in a process of its own, at one amount.

    Raises UserError where one fails; the others are finished first.
    """
    gpus = torch.cuda.device_count()
    processes = settings.processes or gpus or os.cpu_count() or 1

    def run(item: tuple[int, int]) -> int:
        place, seed = item
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % gpus)
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        words = f"--seeds [{seed}] --amounts [{amount}]".split()
        words += ["--plan", settings.plan, "--output", settings.output]
        return subprocess.run([sys.executable, "-m", "pipeline.experiments", *words], env=environment).returncode

    with ThreadPoolExecutor(processes) as pool:
        statuses = list(pool.map(run, enumerate(seeds)))
    failed = [str(seed) for seed, status in zip(seeds, statuses, strict=True) if status]
    if failed:
        raise UserError(f"seeds {', '.join(failed)} failed, see above; the same command runs what is missing")


def main() -> None:
    """Command line; the arguments are the fields of `Settings`."""
    disable_progress_bar()  # of loading and saving small models
    settings: Settings = auto_cli(Settings, as_positional=False)
    plan, output = read_plan(Path(settings.plan)), Path(settings.output)
    seeds, amounts = settings.seeds or plan.seeds, settings.amounts or plan.amounts
    for name, asked, known in (("seeds", seeds, plan.seeds), ("amounts", amounts, plan.amounts)):
        if unknown := sorted(set(asked) - set(known)):
            raise UserError(f"--{name} {unknown} are not in {settings.plan}, which has {known}")
    fix_plan(plan, output)
    if len(seeds) == 1:
        Study(plan, seeds[0], output).run(amounts, lambda text: print(text, flush=True))
        return
    for amount in amounts:  # the first amount is complete for all seeds before the next begins
        run_seeds(settings, seeds, amount)
    print(write_results(plan, output), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)

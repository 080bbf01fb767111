"""Train a model with SOLAR under ZeRO-3.

    deepspeed pipeline/train.py --config pipeline/recipes/demo.yaml [--any.key value] [--dry_run]
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 pipeline/train.py        # two CPU ranks, demo recipe

Any launcher that sets RANK, WORLD_SIZE and MASTER_ADDR will do, and srun as in slurm/train.sh. A run resumes from its
newest complete checkpoint.
"""

import os
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    # Run by path, Python puts this folder first, where our modules would shadow others: the root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

warnings.filterwarnings("ignore", category=FutureWarning)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BEGAN = time.monotonic()
from pipeline.fault_tolerance.signals import StopSignal

if __name__ == "__main__":
    STOP = StopSignal()  # before the imports that take seconds: a signal during them is kept

from pipeline.common import distributed
from pipeline.common.errors import AgreedError, UserError, exit_cleanly
from pipeline.config.recipe import DEMO_RECIPE, load_config


def main(arguments: list[str], stop: StopSignal) -> int:
    """Check everything, then train. Returns the exit status."""
    distributed.set_slurm_environment()
    recipe, dry, overrides = split_arguments(arguments)
    config = load_config(recipe, overrides)

    from pipeline.training.preflight import prepare

    prepared = prepare(config, distributed.rank(), distributed.world_size())

    from pipeline.zero3.ds_config import deepspeed_config
    from pipeline.zero3.engine import start_process_group

    ds = deepspeed_config(config, distributed.world_size())
    if dry:
        from pipeline.plan.dry_run import dry_run

        if distributed.is_main_process():
            dry_run(
                prepared,
                ds,
                distributed.world_size(),
                int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())),
            )
        return 0
    timeout = config.training.hang_timeout_s
    start_process_group(timeout)

    from pipeline.fault_tolerance.guard import Guard
    from pipeline.training.loop import fit

    with Guard(Path(config.output_dir), stop, timeout, BEGAN) as guard:
        status = fit(prepared, guard)
    distributed.shut_down(status)


def split_arguments(arguments: list[str]) -> tuple[str, bool, list[str]]:
    """--config, --dry_run and the launcher's --local_rank apart from the recipe's own keys."""
    recipe, dry, overrides = str(DEMO_RECIPE), False, []
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            recipe = word.partition("=")[2] or next(words, "")
        elif word == "--dry_run":
            dry = True
        elif word == "--local_rank" or word.startswith("--local_rank="):
            if word == "--local_rank":
                next(words, "")
        elif word in ("-h", "--help"):
            print(__doc__)
            sys.exit(0)
        else:
            overrides.append(word)
    return recipe, dry, overrides


def run() -> int:
    """Like `main`, but only rank 0 reports a mistake that all ranks find; others speak if rank 0 does not end."""
    try:
        return main(sys.argv[1:], STOP)
    except AgreedError:
        if not distributed.is_main_process():
            return 2
        raise
    except UserError as error:
        if not distributed.is_main_process():
            time.sleep(5)
            raise UserError(f"rank {distributed.rank()}: {error}") from error
        raise


if __name__ == "__main__":
    exit_cleanly(run)

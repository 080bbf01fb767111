"""Train a model with SOLAR and DeepSpeed ZeRO-3.

    deepspeed pipeline/train.py --config pipeline/recipes/demo.yaml [--any.key value] [--dry_run]
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 pipeline/train.py        # two CPU ranks, demo recipe

torchrun, mpirun and srun (see slurm/train.sh) work as well. A run resumes from its newest complete checkpoint.

  --config RECIPE       recipe file (default: pipeline/recipes/demo.yaml)
  --dry_run             check everything, print sizes, memory and traffic, and exit
  --any.key value       override a setting of the recipe; the settings are:
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts the folder of the script first on sys.path, where its modules would shadow others. Use the root
    # instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

warnings.filterwarnings("ignore", category=FutureWarning)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

STARTED = time.monotonic()
from pipeline.fault_tolerance.signals import StopSignal

if __name__ == "__main__":
    STOP = StopSignal()  # before the slow imports below, so that no signal is lost

from pipeline.common import distributed
from pipeline.common.errors import AgreedError, UserError, exit_cleanly
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.common.launcher import set_launcher_environment
from pipeline.config.recipe import DEMO_RECIPE, help_text, load_config

if TYPE_CHECKING:
    from pipeline.config.settings import Config
    from pipeline.fault_tolerance.guard import Guard
    from pipeline.training.loop import RunEnd
    from pipeline.training.preflight import PreparedRun

USAGE = "deepspeed pipeline/train.py [--config RECIPE] [--dry_run] [--any.key value ...]"


def main(args: list[str], stop: StopSignal) -> int:
    """Check everything, then train and end the process with the exit status. With `--dry_run`, print and return 0."""
    set_launcher_environment()
    recipe, dry_run, overrides = split_args(args)
    config = load_config(recipe, overrides)

    from pipeline.training.preflight import prepare_run
    from pipeline.training.rank_checks import check_process_group

    run = prepare_run(config, distributed.rank(), distributed.world_size())
    from pipeline.zero3.ds_config import deepspeed_config
    from pipeline.zero3.process_group import start_process_group

    ds = deepspeed_config(config, distributed.world_size(), run.model_config.hidden_size, run.max_steps)
    if dry_run:
        from pipeline.plan.dry_run import print_dry_run
        from pipeline.training.resume_checks import find_resume_point

        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
        if distributed.is_main_process():
            check_end_export(run)
            run.check_hashes()
            checkpoint = find_resume_point(run)
            print_dry_run(run, ds, distributed.world_size(), ranks_per_node)
            if checkpoint is not None:
                print("\n".join([f"resumes from {checkpoint.path}", *checkpoint.notes()]))
        return 0
    timeout = config.training.hang_timeout_s
    start_process_group(timeout)
    check_process_group(run.loader.split)
    distributed.broadcast_from_rank0(lambda: check_end_export(run))

    from pipeline.fault_tolerance.guard import Guard
    from pipeline.training.loop import train

    with Guard(Path(config.output_dir), stop, timeout, STARTED) as guard:
        status = finish_run(config, guard, train(run, guard))
    distributed.shut_down(status)


def check_end_export(run: "PreparedRun") -> None:
    """Check that the model may be exported at the end, if the recipe says so. Called on rank 0 only."""
    if run.config.training.export_at_end:
        from pipeline.export import check_export_target

        check_export_target(run.config, run.max_steps)


def finish_run(config: "Config", guard: "Guard", end: "RunEnd") -> int:
    """Export the model if the run is finished, record the end, and return the exit status.

    Collective: all ranks must call it. A signal to any rank ends the export, and a restart repeats it.
    """
    status = end.status
    if status == 0 and config.training.export_at_end:
        from pipeline.export import export_finished_run

        try:
            distributed.run_long_on_rank0(
                lambda: export_finished_run(config),
                lambda: guard.enter_phase(end.step, "exporting the model"),
                lambda: guard.stop.received,
            )
        except distributed.WorkStopped:
            status = STOPPED_BY_SIGNAL
    if distributed.is_main_process():
        if status != end.status:
            signal = guard.stop.name or "a signal to another rank"
            print(f"stopped by {signal} before the model was exported; restart to export it", flush=True)
        guard.restarts.record_end(end.step, status, guard.stop.seconds_since(), end.stopped_early and status == 0)
    return status


def split_args(args: list[str]) -> tuple[str, bool, list[str]]:
    """Separate --config, --dry_run and the --local_rank of the launcher from the setting overrides."""
    recipe, dry_run, overrides = str(DEMO_RECIPE), False, []
    remaining = iter(args)
    for arg in remaining:
        if arg == "--config" or arg.startswith("--config="):
            recipe = arg.partition("=")[2] or next(remaining, "")
        elif arg == "--dry_run":
            dry_run = True
        elif arg == "--local_rank" or arg.startswith("--local_rank="):
            if arg == "--local_rank":
                next(remaining, "")
        elif arg in ("-h", "--help"):
            print(help_text(USAGE, str(__doc__)))
            sys.exit(0)
        else:
            overrides.append(arg)
    return recipe, dry_run, overrides


def run_and_report_once() -> int:
    """Run `main` and print an error only once.

    Rank 0 prints its error at once. The other ranks print none if all have agreed on it. Otherwise they wait first,
    because the launcher ends them meanwhile if rank 0 has failed too.
    """
    try:
        return main(sys.argv[1:], STOP)
    except AgreedError as error:
        if not distributed.is_main_process():
            return error.status
        raise
    except UserError as error:
        if not distributed.is_main_process():
            time.sleep(5)
            raise UserError(f"rank {distributed.rank()}: {error}") from error
        raise


if __name__ == "__main__":
    exit_cleanly(run_and_report_once)

"""Evaluate a model: `python -m pipeline.evaluation`."""

import sys

from jsonargparse import auto_cli

from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.evaluation.runner import evaluate
from pipeline.evaluation.settings import Settings
from pipeline.fault_tolerance.signals import StopSignal


def main() -> int:
    """Command line; the arguments are the fields of `Settings`."""
    stop = StopSignal()
    distributed.set_slurm_environment()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # added by DeepSpeed's launcher
    return evaluate(auto_cli(Settings, args=arguments, as_positional=False), stop)


if __name__ == "__main__":
    exit_cleanly(main)

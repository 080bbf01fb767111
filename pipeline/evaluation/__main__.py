"""Measure accuracy per language by greedy generation, and how often answers agree across languages.

    python -m pipeline.evaluation --model runs/mine/hf --data test.jsonl --output runs/mine

For several GPUs or processes, use `torchrun --nproc-per-node 8 -m pipeline.evaluation …`, `deepspeed --module
pipeline.evaluation …` or slurm/evaluate.sh. The examples are divided among the ranks, and rank 0 writes the same files:
`generations.jsonl` (one line per example), `evaluation.json` (metrics) and `evaluation.md` (a table).

An interrupted evaluation resumes from its finished batches if the same command is run again, also if the run of the
model has completed another checkpoint meanwhile. On USR1 or TERM it stops after the current batch with exit status 75.
With --can_resume, it only prints whether the same command without this flag would resume: yes or no.
"""

import sys

from jsonargparse import auto_cli

from pipeline.common.errors import exit_cleanly
from pipeline.common.launcher import set_launcher_environment
from pipeline.evaluation.runner import can_resume, evaluate
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.fault_tolerance.signals import StopSignal


def main() -> int:
    """Run the command line. The options are the fields of `EvaluationSettings`. Return the exit status."""
    stop = StopSignal()
    set_launcher_environment()
    args = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]  # added by DeepSpeed's launcher
    only_ask = "--can_resume" in args
    settings = auto_cli(
        EvaluationSettings,
        args=[a for a in args if a != "--can_resume"],
        as_positional=False,
        prog="python -m pipeline.evaluation",
    )
    if only_ask:
        print("yes" if can_resume(settings) else "no")
        return 0
    return evaluate(settings, stop)


if __name__ == "__main__":
    exit_cleanly(main)

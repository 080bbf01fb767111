"""Measure what fault tolerance costs a training step: heartbeats, the watchdog, stop flags and save bookkeeping.

    python -m tests.overhead --hidden_size 256 --steps 60

Trains a small model on two CPU ranks and times every call into the guard: wall-clock time on the main thread, CPU time
on the watchdog thread. Prints both as a fraction of the step time. The saves themselves are not included; see
`save_seconds` in metrics.jsonl.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.common.launcher import free_port
from tests.faults import prepare
from tests.runs import ENVIRONMENT, ROOT, TINY, metrics, write_recipe

totals = {"main thread": 0.0, "watchdog thread": 0.0}


def timed(owner: type, name: str, thread: str, clock: Callable[[], float]) -> None:
    """Wrap the method `owner.name` so that it adds its duration to `totals[thread]`."""
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin = clock()
        try:
            return function(*args, **kwargs)
        finally:
            totals[thread] += clock() - begin

    setattr(owner, name, wrapper)


def run_rank(arguments: list[str]) -> None:
    """Train as one rank with the guard timed. Rank 0 prints the totals."""
    from pipeline.checkpoint.saver import Saver
    from pipeline.fault_tolerance.watchdog import Watchdog

    for name in ("local_status", "advance", "pop_wait_seconds"):
        timed(Saver, name, "main thread", time.perf_counter)
    timed(Watchdog, "enter_phase", "main thread", time.perf_counter)
    for name in ("write_heartbeat", "first_failure", "_next_rank_is_silent"):
        timed(Watchdog, name, "watchdog thread", time.thread_time)
    sys.argv = ["pipeline/train.py", *arguments]
    try:
        runpy.run_path("pipeline/train.py", run_name="__main__")
    finally:
        if os.environ["RANK"] == "0":
            print(json.dumps(totals), flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards, tokenizer = prepare(root)
        d = args.hidden_size
        size = {"hidden_size": d, "intermediate_size": 3 * d, "num_hidden_layers": 4, "head_dim": d // 4}
        recipe = write_recipe(
            root / "run.yaml", shards, tokenizer, training__max_steps=args.steps, model__config={**TINY, **size}
        )
        port, ranks = free_port(), []
        for rank in range(2):
            launcher = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = ENVIRONMENT | {key: str(value) for key, value in launcher.items()}
            command = [sys.executable, "-m", "tests.overhead", "--rank", "--config", str(recipe)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        output, _ = [rank.communicate()[0] for rank in ranks]
        result = json.loads(next(line for line in output.splitlines() if line.startswith('{"main')))
        seconds = median(record["step_seconds"] for record in metrics(root / "run")[1:])
    print(f"{args.steps} steps of {seconds:.3f} s (median) on two CPU ranks")
    for thread, total in result.items():
        print(f"{thread}: {total / args.steps * 1e6:.0f} microseconds a step, {total / args.steps / seconds:.4%} of it")


if __name__ == "__main__":
    if "--rank" in sys.argv:
        run_rank(sys.argv[sys.argv.index("--rank") + 1 :])
    else:
        main()

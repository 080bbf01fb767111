"""What the guarding costs a training step: signs of life, watching, stop flags, and the bookkeeping of saves.

    python -m tests.overhead --hidden_size 256 --steps 60

Trains a small model on two CPU ranks, with every function of the guard timed, those of its thread by processor time.
Prints both as a share of the step. Saves themselves are not in it: `save_seconds` in metrics.jsonl has them.
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

from tests.faults import prepare
from tests.runs import ENVIRONMENT, ROOT, TINY, metrics, write_recipe
from tests.workers import free_port

spent = {"main thread": 0.0, "watchdog thread": 0.0}


def timed(owner: type, name: str, where: str, clock: Callable[[], float]) -> None:
    """Have `owner.name` add what it takes to `spent[where]`."""
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin = clock()
        try:
            return function(*args, **kwargs)
        finally:
            spent[where] += clock() - begin

    setattr(owner, name, wrapper)


def be_a_rank(words: list[str]) -> None:
    """One rank with its guard timed; writes what was spent beside the metrics."""
    from pipeline.checkpoint.saver import Saver
    from pipeline.fault_tolerance.watchdog import Watchdog

    for name in ("report", "settle", "take_seconds"):
        timed(Saver, name, "main thread", time.perf_counter)
    timed(Watchdog, "at", "main thread", time.perf_counter)
    for name in ("_beat", "failure", "_next_is_silent"):
        timed(Watchdog, name, "watchdog thread", time.thread_time)
    sys.argv = ["pipeline/train.py", *words]
    try:
        runpy.run_path("pipeline/train.py", run_name="__main__")
    finally:
        if os.environ["RANK"] == "0":
            print(json.dumps(spent), flush=True)


def main() -> None:
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
            facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = ENVIRONMENT | {key: str(value) for key, value in facts.items()}
            words = [sys.executable, "-m", "tests.overhead", "--rank", "--config", str(recipe)]
            ranks.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        output, _ = [rank.communicate()[0] for rank in ranks]
        found = json.loads(next(line for line in output.splitlines() if line.startswith('{"main')))
        seconds = median(record["step_seconds"] for record in metrics(root / "run")[1:])
    print(f"{args.steps} steps of {seconds:.3f} s (median) on two CPU ranks")
    for where, total in found.items():
        print(f"{where}: {total / args.steps * 1e6:.0f} microseconds a step, {total / args.steps / seconds:.4%} of it")


if __name__ == "__main__":
    if "--rank" in sys.argv:
        be_a_rank(sys.argv[sys.argv.index("--rank") + 1 :])
    else:
        main()

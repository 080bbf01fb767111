"""Fault campaign: kill runs at random moments, restart them, and check that no step is lost or repeated.

    python -m tests.faults --runs 10 --kills 60

Each run trains a tiny model on two CPU ranks. It is killed `kills / runs` times: SIGKILL to one rank, to both at once,
or to one while a checkpoint is being written. Each run also receives one USR1. After every fault, all tensors of the
newest complete checkpoint must load. At the end, the run's losses must equal those of an uninterrupted run, bit for bit
and step by step. Prints one line per fault and a summary. The exit status is 1 if any check failed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from pipeline.checkpoint.layout import DEEPSPEED_TAG, newest_checkpoint, read_state
from tests.runs import Fork, losses, python, start_ranks, train, write_recipe

STEPS = 60
FAULTS = ("one rank", "both ranks", "while saving", "USR1")


def prepare(root: Path) -> tuple[Path, Path]:
    """Generate records, and return their shards and tokenizer."""
    data, tokenizer, shards = root / "train.jsonl", root / "tokenizer", root / "shards"
    sizes = ["--train_problems", 60, "--low_resource_problems", 12, "--test_problems", 4]
    for words in (
        ["demo", "--output", data, "--test_output", root / "test.jsonl", *sizes],
        ["tokenizer", "--input", data, "--output", tokenizer, "--vocab_size", 600],
        ["pack", "--input", data, "--tokenizer", tokenizer, "--output", shards, "--max_seq_length", 512],
    ):
        result = python("-m", "data_prep", *words)
        assert result.returncode == 0, result.stderr
    return shards, tokenizer


def wait_for_moment(run: Path, fault: str, generator: random.Random, ranks: list[Fork]) -> None:
    """Wait for a random moment of training, or of the next save, or for the end of the run."""
    done = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
    target, unfinished = done + generator.randint(1, 9), set(run.glob(".checkpoint-*.partial"))
    while all(rank.poll() is None for rank in ranks):
        if fault == "while saving" and set(run.glob(".checkpoint-*.partial")) - unfinished:
            time.sleep(generator.random() * 0.05)
            return
        if fault != "while saving" and (run / "metrics.jsonl").exists() and len(complete_lines(run)) >= target:
            time.sleep(generator.random() * 0.3)
            return
        time.sleep(0.005)


def complete_lines(run: Path) -> list[str]:
    """Return the lines of metrics.jsonl, without a truncated last one."""
    text = (run / "metrics.jsonl").read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def load_newest_checkpoint(run: Path) -> int:
    """Load all tensors of the newest complete checkpoint. Returns its step, or 0 if there is no checkpoint yet."""
    path = newest_checkpoint(run)
    if path is None:
        return 0
    state = read_state(path)
    for file in (path / DEEPSPEED_TAG).rglob("*.pt"):
        torch.load(file, map_location="cpu", weights_only=False)
    return int(state["step"])


def output_of(rank: Fork) -> str:
    """Return a rank's output once it has ended. It is killed after a minute, as `srun --wait=60` does."""
    try:
        return rank.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        return rank.communicate(timeout=60)


def inject_fault(recipe: Path, run: Path, fault: str, generator: random.Random) -> dict[str, object]:
    """Start a run, end it early (unless it completes first) and return a record of what happened."""
    ranks = start_ranks(2, "--config", recipe)
    wait_for_moment(run, fault, generator, ranks)
    victims = ranks if fault == "both ranks" else [generator.choice(ranks)]
    ended = any(rank.poll() is not None for rank in ranks)
    if any(rank.poll() not in (None, 0) for rank in ranks):
        for rank in ranks:
            rank.kill()
        raise AssertionError("a rank failed before the fault:\n" + "\n".join(rank.communicate(60) for rank in ranks))
    for rank in victims:
        rank.send_signal(signal.SIGUSR1 if fault == "USR1" else signal.SIGKILL)
    started = time.monotonic()
    outputs = [output_of(rank) for rank in ranks]
    if any("Traceback" in output for output in outputs):
        raise AssertionError("\n".join(outputs)[-4000:])
    return {
        "fault": "had ended" if ended else fault,
        "seconds": round(time.monotonic() - started, 1),
        "statuses": [rank.returncode for rank in ranks],
        "steps": len(complete_lines(run)) if (run / "metrics.jsonl").exists() else 0,
        "checkpoint": load_newest_checkpoint(run),
    }


def campaign(runs: int, kills: int, seed: int, root: Path) -> bool:
    """Run the campaign and return whether every check passed."""
    generator = random.Random(seed)
    shards, tokenizer = prepare(root)
    settings = {"training__max_steps": STEPS, "training__save_steps": 4}
    uninterrupted = write_recipe(root / "whole.yaml", shards, tokenizer, **settings)
    train(2, "--config", uninterrupted, timeout=900)
    expected = losses(root / "whole")
    records, failed_checks = [], 0
    for number in range(runs):
        recipe = write_recipe(root / f"run{number}.yaml", shards, tokenizer, **settings)
        run = recipe.with_suffix("")
        faults = ["USR1"] + [FAULTS[(number + i) % 3] for i in range(-(-kills // runs))]
        generator.shuffle(faults)
        for fault in faults:
            before = load_newest_checkpoint(run)
            record = inject_fault(recipe, run, fault, generator)
            if record["checkpoint"] < before:  # type: ignore[operator]
                failed_checks += 1
            records.append(record)
            print(json.dumps({"run": number, **record}), flush=True)
        train(2, "--config", recipe, timeout=900)
        metrics = [json.loads(line) for line in complete_lines(run)]
        same = [m["loss"] for m in metrics] == expected and [m["step"] for m in metrics] == list(range(1, STEPS + 1))
        failed_checks += not same
        print(f"run {number}: losses {'equal' if same else 'DIFFER FROM'} those of the uninterrupted run", flush=True)
    killed = [record for record in records if record["fault"] in FAULTS[:3]]
    signals = sum(record["fault"] == "USR1" for record in records)
    seconds = sorted(float(str(record["seconds"])) for record in killed if record["fault"] != "both ranks")
    kinds = ", ".join(f"{fault}: {sum(record['fault'] == fault for record in killed)}" for fault in FAULTS[:3])
    print(
        f"{runs} runs of {STEPS} steps, {len(killed)} kills ({kinds}), {signals} signals, {failed_checks} failed checks"
    )
    print(f"the other rank had exited {median(seconds):.1f} s after a rank was killed (at most {seconds[-1]:.1f} s)")
    return failed_checks == 0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if campaign(args.runs, args.kills, args.seed, Path(folder)) else 1)


if __name__ == "__main__":
    main()

"""A fault campaign: kill runs at random moments, start them again, and check that nothing was lost or repeated.

    python -m tests.faults --runs 10 --kills 60

Each run trains a tiny model on two CPU ranks. It is killed `kills / runs` times: SIGKILL to one rank, to both at once,
or to one while a checkpoint is being written; once more it gets a USR1. After every death the newest
complete checkpoint must be readable whole. At the end the run's losses must equal, bit for bit and step by step, those
of a run that nobody disturbed. Prints one line per death and a summary; status 1 if anything was off.
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

from pipeline.checkpoint.layout import newest, read_state
from tests.runs import Fork, losses, python, start_ranks, train, write_recipe

STEPS = 60
WAYS = ("one rank", "both ranks", "while saving", "USR1")


def prepare(root: Path) -> tuple[Path, Path]:
    """Generated shards and their tokenizer."""
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


def wait_for_moment(run: Path, way: str, chance: random.Random, ranks: list[Fork]) -> None:
    """A random moment of training; or the next save's; or until the run is over."""
    done = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
    target, torn = done + chance.randint(1, 9), set(run.glob(".checkpoint-*.partial"))
    while all(rank.poll() is None for rank in ranks):
        if way == "while saving" and set(run.glob(".checkpoint-*.partial")) - torn:
            time.sleep(chance.random() * 0.05)
            return
        if way != "while saving" and (run / "metrics.jsonl").exists() and len(whole_lines(run)) >= target:
            time.sleep(chance.random() * 0.3)
            return
        time.sleep(0.005)


def whole_lines(run: Path) -> list[str]:
    text = (run / "metrics.jsonl").read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def newest_is_readable(run: Path) -> int:
    """Step of the newest complete checkpoint, all of whose tensors load; 0 where there is none yet."""
    found = newest(run)
    if found is None:
        return 0
    state = read_state(found)
    for file in (found / "zero").rglob("*.pt"):
        torch.load(file, map_location="cpu", weights_only=False)
    return int(state["step"])


def leave(rank: Fork) -> str:
    """A rank's output once it has ended; it is killed where it does not, as srun would with --wait=60."""
    try:
        return rank.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        return rank.communicate(timeout=60)


def disturb(recipe: Path, run: Path, way: str, chance: random.Random) -> dict[str, object]:
    """One start that is ended early (or runs to its end first)."""
    ranks = start_ranks(2, "--config", recipe)
    wait_for_moment(run, way, chance, ranks)
    victims = ranks if way == "both ranks" else [chance.choice(ranks)]
    over = any(rank.poll() is not None for rank in ranks)
    if any(rank.poll() not in (None, 0) for rank in ranks):
        for rank in ranks:
            rank.kill()
        raise AssertionError("a rank ended by itself:\n" + "\n".join(rank.communicate(60) for rank in ranks))
    for rank in victims:
        rank.send_signal(signal.SIGUSR1 if way == "USR1" else signal.SIGKILL)
    began = time.monotonic()
    outputs = [leave(rank) for rank in ranks]
    if any("Traceback" in output for output in outputs):
        raise AssertionError("\n".join(outputs)[-4000:])
    return {
        "way": "had ended" if over else way,
        "seconds": round(time.monotonic() - began, 1),
        "statuses": [rank.returncode for rank in ranks],
        "steps": len(whole_lines(run)) if (run / "metrics.jsonl").exists() else 0,
        "checkpoint": newest_is_readable(run),
    }


def campaign(runs: int, kills: int, seed: int, root: Path) -> bool:
    """Whether all went well."""
    chance = random.Random(seed)
    shards, tokenizer = prepare(root)
    settings = {"training__max_steps": STEPS, "training__save_steps": 4}
    whole = write_recipe(root / "whole.yaml", shards, tokenizer, **settings)
    train(2, "--config", whole, timeout=900)
    expected = losses(root / "whole")
    deaths, wrong = [], 0
    for number in range(runs):
        recipe = write_recipe(root / f"run{number}.yaml", shards, tokenizer, **settings)
        run = recipe.with_suffix("")
        ways = ["USR1"] + [WAYS[(number + i) % 3] for i in range(-(-kills // runs))]
        chance.shuffle(ways)
        for way in ways:
            before = newest_is_readable(run)
            death = disturb(recipe, run, way, chance)
            if death["checkpoint"] < before:  # type: ignore[operator]
                wrong += 1
            deaths.append(death)
            print(json.dumps({"run": number, **death}), flush=True)
        train(2, "--config", recipe, timeout=900)
        records = [json.loads(line) for line in whole_lines(run)]
        same = [r["loss"] for r in records] == expected and [r["step"] for r in records] == list(range(1, STEPS + 1))
        wrong += not same
        print(f"run {number}: {'the same losses' if same else 'OTHER LOSSES'} as undisturbed", flush=True)
    killed = [d for d in deaths if d["way"] in WAYS[:3]]
    signalled = [d for d in deaths if d["way"] == "USR1"]
    gone = sorted(float(str(d["seconds"])) for d in killed if d["way"] != "both ranks")
    kinds = ", ".join(f"{way}: {sum(d['way'] == way for d in killed)}" for way in WAYS[:3])
    print(f"{runs} runs of {STEPS} steps, {len(killed)} kills ({kinds}), {len(signalled)} signals, {wrong} wrong")
    print(f"the other rank was gone {median(gone):.1f} s after a rank's death (at most {gone[-1]:.1f} s)")
    return wrong == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if campaign(args.runs, args.kills, args.seed, Path(folder)) else 1)


if __name__ == "__main__":
    main()

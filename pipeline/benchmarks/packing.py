"""Benchmark: tokenize-and-pack throughput against `datasets.map` plus TRL's `pack_dataset`, ranks, and fill.

    python -m pipeline.benchmarks.packing --input X.jsonl --tokenizer DIR [--rounds 3]  (--rounds 0: fill alone)

Every contender reads the same canonical file and leaves packed rows on disk, in a process of its own bound to one core
(our own also on two ranks, and as two unrelated runs at once: what the machine's second core can add at all),
alternating over the rounds; medians count. Imports and loading a tokenizer are not timed.
On a machine that others use too, compare tokens per second of processor time.
TRL is needed for its rows alone: `pip install -e .[bench]`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError, exit_cleanly

PEERS = {
    "trl": "datasets.map per record with assistant mask, as TRL's SFTTrainer, + pack_dataset",
    "batched": "datasets.map in batches of 1000 with assistant mask + pack_dataset",
    "unmasked": "datasets.map in batches of 1000, rendered text without any mask, + pack_dataset",
}
OURS = "data_prep"
APART = "data_prep twice at once"


def time_ours(args: argparse.Namespace, output: Path) -> dict:
    """One packing run here, on this process's ranks."""
    from data_prep import ranks
    from data_prep.packing import packer as pack

    here = ranks.start()
    settings = pack.PackSettings(max_seq_length=args.max_seq_length)
    pack.load_tokenizer(args.tokenizer)  # imports and file caches
    here.all_gather(None)
    start = time.perf_counter(), time.process_time()
    manifest = pack.pack([args.input], args.tokenizer, output, settings, here)
    return {**_elapsed(start), "tokens": manifest["totals"]["tokens"], "fill": manifest["fill"]}


def time_peer(args: argparse.Namespace, output: Path) -> dict:
    """One run of `datasets.map` and `pack_dataset` here; single sequences, since TRL knows no groups."""
    from datasets import load_dataset
    from trl import pack_dataset

    from data_prep.tokenization.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(args.tokenizer)

    def chat(question: str, answer: str) -> Any:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def one(record: dict) -> dict:
        found = tokenizer.apply_chat_template(
            chat(record["question"], record["answer"]), return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    def many(records: dict) -> dict:
        chats = [chat(*pair) for pair in zip(records["question"], records["answer"], strict=True)]
        found = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    def unmasked(records: dict) -> dict:
        chats = [chat(*pair) for pair in zip(records["question"], records["answer"], strict=True)]
        return {"input_ids": tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]}

    start = time.perf_counter(), time.process_time()
    dataset = load_dataset("json", data_files=str(args.input), split="train", cache_dir=str(output))
    tokenize = {"trl": one, "batched": many, "unmasked": unmasked}[args.contender]
    dataset = dataset.map(tokenize, batched=args.contender != "trl", remove_columns=dataset.column_names)
    dataset = pack_dataset(dataset, args.max_seq_length)
    elapsed = _elapsed(start)
    tokens = sum(len(ids) for ids in dataset["input_ids"])
    return {**elapsed, "tokens": tokens, "fill": tokens / len(dataset) / args.max_seq_length}


def _elapsed(start: tuple[float, float]) -> dict[str, float]:
    return {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}


def run_apart(args: argparse.Namespace) -> dict:
    """Two runs of ours side by side, which share nothing but the machine; tokens of both, time of the slower."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda core: run_contender(args, OURS, first_core=core), (0, 1)))
    return {**max(runs, key=lambda run: run["seconds"]), "tokens": sum(run["tokens"] for run in runs)}


def run_contender(args: argparse.Namespace, contender: str, ranks: int = 1, first_core: int = 0) -> dict:
    """Run this file again for one contender on `ranks` cores; returns its slowest rank's result."""
    if contender == APART:
        return run_apart(args)
    line = [
        sys.executable,
        "-m",
        "pipeline.benchmarks.packing",
        "--input",
        str(args.input),
        "--tokenizer",
        args.tokenizer,
    ]
    line += ["--max_seq_length", str(args.max_seq_length), "--contender", contender]
    if ranks > 1:
        launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        line = launcher + (["--allow-run-as-root"] if os.getuid() == 0 else []) + line
    cores = sorted(os.sched_getaffinity(0))[first_core : first_core + ranks]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where the package openmpi puts mpirun
    environment = {
        **os.environ,
        "PATH": path,
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores)), *line, "--output", f"{folder}/out"],
            env={**environment, "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise UserError(f"contender {contender} failed: {done.stderr.strip().splitlines()[-1]}")
    results = [json.loads(found) for found in done.stdout.splitlines() if found.startswith("{")]
    return max(results, key=lambda result: result["seconds"])


def compare(args: argparse.Namespace) -> list[dict]:
    """Median throughput of every contender over the rounds, as rows."""
    contenders = [(OURS, 1), (OURS, 2), (APART, 1), *((peer, 1) for peer in PEERS)] if args.rounds else []
    results: dict[tuple[str, int], list[dict]] = {contender: [] for contender in contenders}
    for _ in range(args.rounds):
        for contender in contenders:
            results[contender].append(run_contender(args, *contender))
    rows = []
    for (name, ranks), found in results.items():
        rate, cpu_rate = (
            round(statistics.median(result["tokens"] / result[kind] for result in found))
            for kind in ("seconds", "cpu_seconds")
        )
        row = {"contender": name, "ranks": ranks, "tokens_per_second": rate, "tokens_per_cpu_second": cpu_rate}
        rows.append({**row, "fill": round(found[0]["fill"], 4)})
    for row in rows:
        row["ours_is_times"] = round(rows[0]["tokens_per_second"] / row["tokens_per_second"], 2)
    return rows


def fills(args: argparse.Namespace) -> list[dict]:
    """Fill at the given length of groups and of single sequences, against the bound no packing can pass."""
    from data_prep.packing.bin_packing import best_fit_decreasing, pack_bins
    from data_prep.records import read_records
    from data_prep.tokenization.chat_template import ChatEncoder
    from data_prep.tokenization.tokenizer import load_tokenizer

    encoder, size = ChatEncoder(load_tokenizer(args.tokenizer)), args.max_seq_length
    groups: dict[str, int] = {}
    singles: list[int] = []
    for record in read_records([args.input]):
        (tokens,) = encoder.encode([record.messages])
        if not isinstance(tokens, UserError):
            singles.append(len(tokens))
            groups[record.pair_id] = groups.get(record.pair_id, 0) + len(tokens)
    rows = []
    for name, found in (("groups", list(groups.values())), ("single sequences", singles)):
        lengths = [length for length in found if length <= size]
        bound = max(-(-sum(lengths) // size), sum(2 * length > size for length in lengths))
        bins = {
            "ours": len(pack_bins(lengths, size)),
            "best_fit_decreasing": len(best_fit_decreasing(lengths, size)),
            "next_fit": _next_fit(lengths, size),
            "bound": bound,
        }
        fill = {way: round(sum(lengths) / size / number, 4) for way, number in bins.items()}
        rows.append(
            {"fill_of": name, "max_seq_length": size, "mean_length": round(sum(lengths) / len(lengths)), **fill}
        )
    return rows


def _next_fit(lengths: list[int], size: int) -> int:
    bins, room = 1, size
    for length in lengths:
        if length > room:
            bins, room = bins + 1, size
        room -= length
    return bins


def machine() -> str:
    """Processor, cores, and the versions that matter."""
    names = ("tokenizers", "transformers", "datasets", "pyarrow", "trl")
    installed = {found.name for found in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="canonical JSON Lines with question and answer")
    parser.add_argument("--tokenizer", required=True, help="tokenizer directory or hub id")
    parser.add_argument("--max_seq_length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", choices=[OURS, *PEERS], help=argparse.SUPPRESS)  # a child of this benchmark
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        timed = time_ours if args.contender == OURS else time_peer
        print(json.dumps(timed(args, args.output)), flush=True)
        return
    print(machine())
    for row in [*fills(args), *compare(args)]:
        print(json.dumps(row))


if __name__ == "__main__":
    exit_cleanly(main)

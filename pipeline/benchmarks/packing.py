"""Measure tokenize-and-pack throughput and packing efficiency, against `datasets.map` with TRL's `pack_dataset`.

    python -m pipeline.benchmarks.packing --input X.jsonl --tokenizer DIR [--rounds 3]  (--rounds 0: efficiency only)

Every variant reads the same canonical file and writes packed rows to disk, in its own process bound to one core.
data_prep also runs on two ranks, and as two independent runs at once, which gives an upper bound for the speedup from a
second core. Variants run in turn for `rounds` rounds, and medians are reported. Loading the tokenizer is timed, imports
are not. On a shared machine, compare tokens per second of processor time. Only the baselines require TRL:
`pip install -e .[bench]`.
"""

import argparse
import gc
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

from pipeline.benchmarks.common import processor_name
from pipeline.common.errors import UserError, exit_cleanly

BASELINES = {
    "trl": "datasets.map per record with assistant mask, as TRL's SFTTrainer, + pack_dataset",
    "batched": "datasets.map in batches of 1000 with assistant mask + pack_dataset",
    "unmasked": "datasets.map in batches of 1000, rendered text without any mask, + pack_dataset",
}
DATA_PREP = "data_prep"
TWO_RUNS = "data_prep twice at once"


def time_data_prep(args: argparse.Namespace, output: Path) -> dict:
    """Time one packing run on the ranks of this process."""
    import pandas  # noqa: F401  (pyarrow imports it when it is first used)

    from data_prep import ranks
    from data_prep.packing.packer import PackSettings, pack
    from data_prep.tokenization.tokenizer import load_tokenizer

    local_ranks = ranks.start()
    settings = PackSettings(max_seq_length=args.max_seq_length)
    load_tokenizer(args.tokenizer)  # so that its imports and disk reads are not timed
    gc.freeze()  # as `python -m data_prep pack` does
    local_ranks.all_gather(None)
    start = time.perf_counter(), time.process_time()
    manifest = pack([args.input], args.tokenizer, output, settings, local_ranks)
    return {**_elapsed(start), "tokens": manifest["totals"]["tokens"], "fill": manifest["fill"]}


def time_baseline(args: argparse.Namespace, output: Path) -> dict:
    """Time one run of `datasets.map` and `pack_dataset` on single sequences, as TRL has no groups."""
    from datasets import load_dataset
    from trl import pack_dataset

    from data_prep.tokenization.tokenizer import load_tokenizer

    load_tokenizer(args.tokenizer)  # as in `time_data_prep`
    start = time.perf_counter(), time.process_time()
    tokenizer: Any = load_tokenizer(args.tokenizer)

    def chat(question: str, answer: str) -> Any:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def masked(record: dict) -> dict:
        messages = chat(record["question"], record["answer"])
        tokens = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": tokens["input_ids"], "assistant_masks": tokens["assistant_masks"]}

    def masked_batch(records: dict) -> dict:
        chats = [chat(*pair) for pair in zip(records["question"], records["answer"], strict=True)]
        tokens = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": tokens["input_ids"], "assistant_masks": tokens["assistant_masks"]}

    def unmasked_batch(records: dict) -> dict:
        chats = [chat(*pair) for pair in zip(records["question"], records["answer"], strict=True)]
        return {"input_ids": tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]}

    dataset = load_dataset("json", data_files=str(args.input), split="train", cache_dir=str(output))
    tokenize = {"trl": masked, "batched": masked_batch, "unmasked": unmasked_batch}[args.variant]
    dataset = dataset.map(tokenize, batched=args.variant != "trl", remove_columns=dataset.column_names)
    dataset = pack_dataset(dataset, args.max_seq_length)
    elapsed = _elapsed(start)
    tokens = sum(len(ids) for ids in dataset["input_ids"])
    return {**elapsed, "tokens": tokens, "fill": tokens / len(dataset) / args.max_seq_length}


def _elapsed(start: tuple[float, float]) -> dict[str, float]:
    return {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}


def run_twice_at_once(args: argparse.Namespace) -> dict:
    """Run data_prep twice at once on different cores. Return the tokens of both runs and the time of the slower one."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda core: run_variant(args, DATA_PREP, first_core=core), (0, 1)))
    return {**max(runs, key=lambda run: run["seconds"]), "tokens": sum(run["tokens"] for run in runs)}


def run_variant(args: argparse.Namespace, variant: str, ranks: int = 1, first_core: int = 0) -> dict:
    """Run one variant on `ranks` cores in separate processes. Return the result of its slowest rank.

    Raises:
        UserError: the variant fails.
    """
    if variant == TWO_RUNS:
        return run_twice_at_once(args)
    command = [sys.executable, "-m", "pipeline.benchmarks.packing", "--contender", variant]
    command += ["--input", str(args.input), "--tokenizer", args.tokenizer]
    command += ["--max_seq_length", str(args.max_seq_length)]
    if ranks > 1:
        launcher = ["mpirun", "--oversubscribe", "--bind-to", "core:overload-allowed", "-n", str(ranks)]
        command = launcher + (["--allow-run-as-root"] if os.getuid() == 0 else []) + command
    cores = sorted(os.sched_getaffinity(0))[first_core : first_core + ranks]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for the mpirun of the openmpi package
    environment = {
        **os.environ,
        "PATH": path,
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores)), *command, "--output", f"{folder}/out"],
            env={**environment, "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise UserError(f"variant {variant} failed: {done.stderr.strip().splitlines()[-1]}")
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return max(results, key=lambda result: result["seconds"])


def compare(args: argparse.Namespace) -> list[dict]:
    """Run all variants and return one row for each with its median throughput over the rounds."""
    variants = (
        [(DATA_PREP, 1), (DATA_PREP, 2), (TWO_RUNS, 1), *((name, 1) for name in BASELINES)] if args.rounds else []
    )
    results: dict[tuple[str, int], list[dict]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            results[variant].append(run_variant(args, *variant))
    rows = []
    for (name, ranks), runs in results.items():
        rate, cpu_rate = (
            round(statistics.median(result["tokens"] / result[kind] for result in runs))
            for kind in ("seconds", "cpu_seconds")
        )
        row = {"contender": name, "ranks": ranks, "tokens_per_second": rate, "tokens_per_cpu_second": cpu_rate}
        rows.append({**row, "fill": round(runs[0]["fill"], 4)})
    for row in rows:
        row["ours_is_times"] = round(rows[0]["tokens_per_second"] / row["tokens_per_second"], 2)
    return rows


def packing_efficiencies(args: argparse.Namespace) -> list[dict]:
    """Compute the packing efficiency of groups and of single sequences, for several algorithms and an upper bound."""
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
    for name, items in (("groups", list(groups.values())), ("single sequences", singles)):
        lengths = [length for length in items if length <= size]
        bound = max(-(-sum(lengths) // size), sum(2 * length > size for length in lengths))
        bins = {
            "ours": len(pack_bins(lengths, size)),
            "best_fit_decreasing": len(best_fit_decreasing(lengths, size)),
            "next_fit": next_fit(lengths, size),
            "bound": bound,
        }
        efficiency = {algorithm: round(sum(lengths) / size / count, 4) for algorithm, count in bins.items()}
        row = {"fill_of": name, "max_seq_length": size, "mean_length": round(sum(lengths) / len(lengths))}
        rows.append(row | efficiency)
    return rows


def next_fit(lengths: list[int], size: int) -> int:
    """Return the number of bins that next-fit packing uses."""
    bins, room = 1, size
    for length in lengths:
        if length > room:
            bins, room = bins + 1, size
        room -= length
    return bins


def machine_and_versions() -> str:
    """Return the processor, the number of cores, and the versions of the packages involved."""
    names = ("tokenizers", "transformers", "datasets", "pyarrow", "trl")
    installed = {package.name for package in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)
    return f"{processor_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="canonical JSON Lines with question and answer")
    parser.add_argument("--tokenizer", required=True, help="tokenizer directory or Hub model ID")
    parser.add_argument("--max_seq_length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    # Set in child processes.
    parser.add_argument("--contender", dest="variant", choices=[DATA_PREP, *BASELINES], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        run = time_data_prep if args.variant == DATA_PREP else time_baseline
        print(json.dumps(run(args, args.output)), flush=True)
        return
    print(machine_and_versions())
    for row in [*packing_efficiencies(args), *compare(args)]:
        print(json.dumps(row))


if __name__ == "__main__":
    exit_cleanly(main)

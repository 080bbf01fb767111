"""Two models on the same problems: difference in accuracy, paired bootstrap interval, exact McNemar test.

    python -m pipeline.compare --baseline runs/sft --candidate runs/solar --output runs/solar

Reads each run's `generations.jsonl`, written by `pipeline.evaluation`; writes `comparison.json` and `comparison.md`.
"""

import argparse
import json
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError, exit_cleanly

RESAMPLES = 10_000
Rows = dict[tuple[str, str], dict[str, Any]]  # by pair_id and language


def compare_runs(baseline: Path, candidate: Path) -> dict[str, Any]:
    """The content of `comparison.json`: by language, and under `mean` the mean of the languages.

    Shares in [0, 1]; `difference` is candidate minus baseline, `low` and `high` its 95 % interval. `gained` problems
    the candidate alone solves, `lost` the baseline alone; `mcnemar_p` is the exact two-sided p of the two.
    Raises UserError where a file is missing or damaged, or where the two have no record, or not one gold, in common.
    """
    first, second = read_generations(baseline), read_generations(candidate)
    shared = [key for key in first if key in second]
    if not shared:
        raise UserError(f"{candidate}: no record in common with {baseline}; evaluate both on the same data")
    for pair_id, lang in shared:
        if first[pair_id, lang]["gold"] != second[pair_id, lang]["gold"]:
            raise UserError(
                f"{candidate}: pair_id {pair_id!r}, {lang}: another gold than in {baseline}; "
                "evaluate both on the same data"
            )
    problems = {pair_id: row for row, pair_id in enumerate(dict.fromkeys(pair_id for pair_id, _ in shared))}
    languages = {lang: column for column, lang in enumerate(sorted({lang for _, lang in shared}))}
    right = np.full((2, len(problems), len(languages)), np.nan)
    for pair_id, lang in shared:
        for model, rows in enumerate((first, second)):
            right[model, problems[pair_id], languages[lang]] = rows[pair_id, lang]["correct"]
    return {
        "baseline": str(baseline),
        "candidate": str(candidate),
        "records": len(shared),
        "left_out": len(first.keys() ^ second.keys()),
        **compare_matrices(right[0], right[1], list(languages)),
    }


def compare_matrices(baseline: np.ndarray, candidate: np.ndarray, languages: list[str]) -> dict[str, Any]:
    """`languages` and `mean` of two [problems, languages] matrices of 1 right, 0 wrong, nan absent."""
    low, high, mean_low, mean_high = bootstrap(candidate - baseline)
    accuracies = np.nanmean(baseline, 0), np.nanmean(candidate, 0)
    described = {}
    for column, lang in enumerate(languages):
        gained = int(((candidate - baseline)[:, column] == 1).sum())
        lost = int(((candidate - baseline)[:, column] == -1).sum())
        described[lang] = {
            "n": int((~np.isnan(baseline[:, column])).sum()),
            "baseline": float(accuracies[0][column]),
            "candidate": float(accuracies[1][column]),
            "difference": float(accuracies[1][column] - accuracies[0][column]),
            "low": float(low[column]),
            "high": float(high[column]),
            "gained": gained,
            "lost": lost,
            "mcnemar_p": mcnemar(gained, lost),
        }
    means = [float(one.mean()) for one in accuracies]
    difference = {"baseline": means[0], "candidate": means[1], "difference": means[1] - means[0]}
    return {"languages": described, "mean": {**difference, "low": mean_low, "high": mean_high}}


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p that `gained` and `lost` are tosses of a fair coin (McNemar's test, binomial form)."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float, float]:
    """95 % percentile intervals of the mean difference: [L] lows and highs by language, low and high of their mean.

    differences: [P, L] of -1, 0, 1, nan where absent. Whole problems are drawn, so that a problem's languages, which
    are no independent observations, stay together.
    """
    present = (~np.isnan(differences)).astype(np.float64)
    values = np.nan_to_num(differences)
    generator, size = np.random.default_rng(seed), len(differences)
    resampled = []
    block = max(1, 10_000_000 // size)
    for start in range(0, RESAMPLES, block):
        counts = generator.multinomial(size, np.full(size, 1 / size), size=min(block, RESAMPLES - start))
        resampled.append((counts @ values) / np.maximum(counts @ present, 1))
    means = np.concatenate(resampled)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    mean_low, mean_high = np.quantile(means.mean(1), [0.025, 0.975])
    return low, high, float(mean_low), float(mean_high)


def read_generations(path: Path) -> Rows:
    """The rows of a run's `generations.jsonl`, the path of which or of its directory is given.

    Raises UserError naming file and row.
    """
    path = path / "generations.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; python -m pipeline.evaluation writes it")
    rows: Rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["correct"], bool):
                raise TypeError
            rows[row["pair_id"], row["lang"]] = {"correct": row["correct"], "gold": row["gold"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} row {number}: not a row of pipeline.evaluation.generation; run that again"
            ) from None
    if not rows:
        raise UserError(f"{path}: empty file; run pipeline.evaluation.generation again")
    return rows


def comparison_table(result: dict[str, Any]) -> str:
    """Markdown, in percent and percentage points."""
    lines = [
        "| language | problems | baseline % | candidate % | difference | 95 % interval | gained, lost | McNemar p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for lang, one in result["languages"].items():
        tested = f"{one['gained']}, {one['lost']} | {one['mcnemar_p']:.3g}"
        lines.append(f"| {lang} | {one['n']} | {_figures(one)} | {tested} |")
    lines.append(f"| **mean of languages** | | {_figures(result['mean'])} | | |")
    return "\n".join(lines)


def _figures(one: dict[str, Any]) -> str:
    points = [100 * one[key] for key in ("baseline", "candidate", "difference", "low", "high")]
    return "{:.1f} | {:.1f} | {:+.1f} | {:+.1f} to {:+.1f}".format(*points)


def main() -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=about)
    parser.add_argument("--baseline", type=Path, required=True, help="run, or its generations.jsonl")
    parser.add_argument("--candidate", type=Path, required=True, help="run, or its generations.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="directory of the two files written")
    args = parser.parse_args()
    result = compare_runs(args.baseline, args.candidate)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written to ({error.strerror}); give another --output") from None
    heading = f"# {result['candidate']} against {result['baseline']}"
    left_out = f"\n\n{result['left_out']} records of one run only were left out." if result["left_out"] else ""
    text = f"{heading}\n\n{comparison_table(result)}{left_out}\n"
    write_atomically(args.output / "comparison.md", text.encode())
    write_atomically(args.output / "comparison.json", (json.dumps(result, indent=2) + "\n").encode())
    print(f"{text}\nwritten: {args.output}/comparison.json, comparison.md")


if __name__ == "__main__":
    exit_cleanly(main)

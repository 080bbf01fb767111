"""Compare two models on the same questions: accuracy difference, paired bootstrap interval, exact McNemar test.

    python -m pipeline.compare --baseline runs/sft --candidate runs/solar --output runs/solar

Reads `generations.jsonl` and `evaluation.json` of each run, which `pipeline.evaluation` writes into the same directory.
Writes `comparison.json` and `comparison.md`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.evaluation.significance import mcnemar, paired_bootstrap

ScoredAnswers = dict[tuple[str, str], dict[str, Any]]  # (pair_id, lang) to `correct`, `finished` and `gold`


def compare_runs(baseline: Path, candidate: Path) -> dict[str, Any]:
    """Compare two runs on the records that they have in common.

    Args:
        baseline: directory of a run, or its `generations.jsonl`.
        candidate: directory of the other run, or its `generations.jsonl`.

    Returns:
        The content of `comparison.json`. `unfinished`: for each language, the numbers of responses of baseline and
        candidate that were cut at the token limit. `languages`: metrics per language. `mean`: their mean over
        languages. See `compare_matrices` for both. `dtype`: data type in which both models ran. `records`: number of
        records in common. `left_out`: number of records found in only one run.

    Raises:
        UserError: a file is missing or damaged, or the runs have no record in common, different gold answers or
            different data types.
    """
    first, second = read_generations(baseline), read_generations(candidate)
    dtypes = [read_dtype(baseline), read_dtype(candidate)]
    if dtypes[0] != dtypes[1]:
        raise UserError(
            f"{candidate}: ran in {dtypes[1]}, but {baseline} in {dtypes[0]}; evaluate both with the same --dtype"
        )
    common = [key for key in first if key in second]
    if not common:
        raise UserError(f"{candidate}: no record in common with {baseline}; evaluate both on the same data")
    for pair_id, lang in common:
        if first[pair_id, lang]["gold"] != second[pair_id, lang]["gold"]:
            raise UserError(
                f"{candidate}: pair_id {pair_id!r}, {lang}: a gold answer that differs from {baseline}; "
                "evaluate both on the same data"
            )
    groups = {pair_id: row for row, pair_id in enumerate(dict.fromkeys(pair_id for pair_id, _ in common))}
    languages = {lang: column for column, lang in enumerate(sorted({lang for _, lang in common}))}
    correct = np.full((2, len(groups), len(languages)), np.nan)
    unfinished = {lang: [0, 0] for lang in languages}
    for pair_id, lang in common:
        for model, answers in enumerate((first, second)):
            correct[model, groups[pair_id], languages[lang]] = answers[pair_id, lang]["correct"]
            unfinished[lang][model] += not answers[pair_id, lang]["finished"]
    return {
        "unfinished": unfinished,
        "baseline": str(baseline),
        "candidate": str(candidate),
        "dtype": dtypes[0],
        "records": len(common),
        "left_out": len(first.keys() ^ second.keys()),
        **compare_matrices(correct[0], correct[1], list(languages)),
    }


def compare_matrices(baseline: np.ndarray, candidate: np.ndarray, languages: list[str]) -> dict[str, Any]:
    """Compare two models' answers.

    Args:
        baseline: [G, L] matrix over example groups and languages: 1 correct, 0 wrong, nan absent.
        candidate: the same matrix for the other model.
        languages: the L language codes.

    Returns:
        `languages`: for each language `n` (number of examples), the accuracies `baseline` and `candidate`, and their
        `difference` (candidate minus baseline) with its 95 % bootstrap interval `low` to `high`. `gained` and `lost`
        are the numbers of questions that only the candidate or only the baseline answers correctly, and `mcnemar_p` is
        the p-value of these two. `mean`: mean accuracies over languages, and their difference with its interval.
        Accuracies are fractions in [0, 1].
    """
    differences = candidate - baseline
    low, high, mean_low, mean_high = paired_bootstrap(differences)
    accuracies = np.nanmean(baseline, 0), np.nanmean(candidate, 0)
    by_language = {}
    for column, lang in enumerate(languages):
        gained = int((differences[:, column] == 1).sum())
        lost = int((differences[:, column] == -1).sum())
        by_language[lang] = {
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
    means = [float(accuracy.mean()) for accuracy in accuracies]
    mean = {"baseline": means[0], "candidate": means[1], "difference": means[1] - means[0]}
    return {"languages": by_language, "mean": {**mean, "low": mean_low, "high": mean_high}}


def read_generations(path: Path) -> ScoredAnswers:
    """Read the `generations.jsonl` of a run. `path` is the file or its directory.

    Returns:
        For each (pair_id, lang), whether the answer is `correct` and `finished`, and the `gold` answer.

    Raises:
        UserError: the file is missing, empty or malformed; the message names the file and the row.
    """
    path = path / "generations.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; python -m pipeline.evaluation writes it")
    answers: ScoredAnswers = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            answer = {key: row[key] for key in ("correct", "finished", "gold")}
            if not isinstance(answer["correct"], bool) or not isinstance(answer["finished"], bool):
                raise TypeError
            answers[row["pair_id"], row["lang"]] = answer
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} row {number}: not a row of pipeline.evaluation; run that again") from None
    if not answers:
        raise UserError(f"{path}: empty file; run pipeline.evaluation again")
    return answers


def read_dtype(path: Path) -> str:
    """Return the data type in which the model of a run was evaluated, from the `evaluation.json` of the run.

    Args:
        path: directory of the run, or its `generations.jsonl`.

    Raises:
        UserError: the file is missing, or was written by an older version.
    """
    path = (path if path.is_dir() else path.parent) / "evaluation.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model"]["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: missing, or without the model's dtype; run pipeline.evaluation again") from None


def comparison_table(result: dict[str, Any]) -> str:
    """Format the content of `comparison.json` as a Markdown table, in percent and percentage points."""
    lines = [
        "| language | problems | unfinished | baseline % | candidate % | difference | 95 % interval | gained, lost "
        "| McNemar p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for lang, metrics in result["languages"].items():
        counts = f"{metrics['n']} | {_pair(result['unfinished'][lang])}"
        test_cells = f"{metrics['gained']}, {metrics['lost']} | {metrics['mcnemar_p']:.3g}"
        lines.append(f"| {lang} | {counts} | {_accuracy_cells(metrics)} | {test_cells} |")
    total = _pair(unfinished_totals(result))
    lines.append(f"| **mean of languages** | | {total} | {_accuracy_cells(result['mean'])} | | |")
    return "\n".join(lines)


def unfinished_totals(result: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of unfinished responses of baseline and candidate in a comparison."""
    counts = result["unfinished"].values()
    return sum(baseline for baseline, _ in counts), sum(candidate for _, candidate in counts)


def unfinished_summary(result: dict[str, Any]) -> str:
    """Describe in one sentence how many responses of each model are unfinished."""
    baseline, candidate = unfinished_totals(result)
    return (
        f"Of {result['records']} responses, {baseline} of the baseline and {candidate} of the candidate are unfinished "
        f"(cut at the token limit). Both models ran in {result['dtype']}."
    )


def _pair(counts: Sequence[int]) -> str:
    return f"{counts[0]}, {counts[1]}"


def _accuracy_cells(metrics: dict[str, Any]) -> str:
    points = [100 * metrics[key] for key in ("baseline", "candidate", "difference", "low", "high")]
    return "{:.1f} | {:.1f} | {:+.1f} | {:+.1f} to {:+.1f}".format(*points)


def main() -> None:
    """Run the command line."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=description)
    parser.add_argument("--baseline", type=Path, required=True, help="directory of a run, or its generations.jsonl")
    parser.add_argument(
        "--candidate", type=Path, required=True, help="directory of the other run, or its generations.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for the two result files")
    args = parser.parse_args()
    result = compare_runs(args.baseline, args.candidate)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror}); give another --output") from None
    heading = f"# {result['candidate']} against {result['baseline']}"
    left_out = f"\n\n{result['left_out']} records of only one run were left out." if result["left_out"] else ""
    text = f"{heading}\n\n{unfinished_summary(result)}\n\n{comparison_table(result)}{left_out}\n"
    write_atomically(args.output / "comparison.md", text.encode())
    write_atomically(args.output / "comparison.json", (json.dumps(result, indent=2) + "\n").encode())
    print(f"{text}\nwritten: {args.output}/comparison.json, comparison.md")


if __name__ == "__main__":
    exit_cleanly(main)

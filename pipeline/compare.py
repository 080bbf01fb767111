"""Compare two models, each trained with one or several seeds, on the same questions.

    python -m pipeline.compare --baseline runs/sft --candidate runs/solar --output runs/solar
    python -m pipeline.compare --baseline runs/sft-seed1 runs/sft-seed2 runs/sft-seed3 \
        --candidate runs/solar-seed1 runs/solar-seed2 runs/solar-seed3 --primary sw te th --output runs/solar

Reads `generations.jsonl` and `evaluation.json` of each run, which `pipeline.evaluation` writes into the same directory.
Writes `comparison.json` and `comparison.md`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.evaluation.accuracy import percent
from pipeline.evaluation.results_reader import read_paired_scores, read_seed
from pipeline.evaluation.seed_intervals import reduce_languages, seed_interval
from pipeline.evaluation.significance import holm, mcnemar, paired_bootstrap

SIGNIFICANCE_LEVEL = 0.05
MEAN = "mean"  # name of the mean over all languages as the primary measure


def compare_runs(
    baseline: Path | Sequence[Path], candidate: Path | Sequence[Path], primary: Sequence[str] = (MEAN,)
) -> dict[str, Any]:
    """Compare two models on the records that all their runs have in common.

    Args:
        baseline: directory of a run or its `generations.jsonl`, or those of several seeds.
        candidate: the same for the other model, with the seeds in the same order.
        primary: the measure that decides, named before the results are known: `mean` or languages to average.

    Returns:
        The content of `comparison.json`. `baseline`, `candidate`: the paths. `seeds`: the seed of each pair of runs,
        None if unknown. `unfinished`: for each language, the numbers of responses of baseline and candidate that were
        cut at the token limit, over all seeds. `responses`: the numbers of all their responses. `languages`, `mean`,
        `primary`: see `compare_matrices`. `dtype`: data type in which all models ran. `different_settings`: settings of
        the evaluations that differ, with the value of each run, first those of the baseline. `problems`: number of
        problems. `records`: number of records in common. `left_out`: number of records that at least one run lacks.

    Raises:
        UserError: a file is missing or damaged, the runs cannot be paired, or a primary language is unknown.
    """
    baselines, candidates = ([p] if isinstance(p, Path) else list(p) for p in (baseline, candidate))
    seeds = _pair_seeds(baselines, candidates)
    scores = read_paired_scores([*baselines, *candidates])
    if unknown := [lang for lang in primary if lang not in (MEAN, *scores.languages)]:
        raise UserError(f"--primary: no language {unknown[0]!r}; choose {MEAN} or from {', '.join(scores.languages)}")
    if MEAN in primary and len(primary) > 1:
        raise UserError(f"--primary: give either {MEAN} or languages")
    first, second = np.split(scores.correct, 2)
    unfinished = np.stack([part.sum(0) for part in np.split(scores.unfinished, 2)], axis=1)
    return {
        "unfinished": dict(zip(scores.languages, unfinished.tolist(), strict=True)),
        "responses": [int(part.sum()) for part in np.split(scores.responses, 2)],
        "baseline": [str(path) for path in baselines],
        "candidate": [str(path) for path in candidates],
        "seeds": seeds,
        "dtype": scores.dtype,
        "different_settings": scores.different_settings,
        "problems": scores.correct.shape[1],
        "records": scores.records,
        "left_out": scores.left_out,
        **compare_matrices(first, second, scores.languages, primary),
    }


def _pair_seeds(baselines: Sequence[Path], candidates: Sequence[Path]) -> list[int | None]:
    """Return the seed of each pair of runs.

    Raises:
        UserError: the numbers of runs differ, or several pairs have different seeds within a pair, or the same seed.
    """
    if len(baselines) != len(candidates):
        raise UserError(
            f"{len(baselines)} runs of the baseline but {len(candidates)} of the candidate; give one pair per seed"
        )
    pairs = [(read_seed(first), read_seed(second)) for first, second in zip(baselines, candidates, strict=True)]
    if len(pairs) > 1:
        for path, seed, other in ((run, *pair) for run, pair in zip(candidates, pairs, strict=True)):
            if None not in (seed, other) and seed != other:
                raise UserError(f"{path}: trained with seed {other}, its baseline with {seed}; give the same order")
        for paths, column in ((baselines, 0), (candidates, 1)):
            seeds = [pair[column] for pair in pairs]
            for number, (path, seed) in enumerate(zip(paths, seeds, strict=True)):
                if path in paths[:number] or (seed is not None and seed in seeds[:number]):
                    raise UserError(f"{path}: the same seed as an earlier run; several runs must differ in the seed")
    return [first if first == second else None for first, second in pairs]


def compare_matrices(
    baseline: np.ndarray, candidate: np.ndarray, languages: list[str], primary: Sequence[str] = (MEAN,)
) -> dict[str, Any]:
    """Compare two models' answers.

    Args:
        baseline: [S, G, L] scores in [0, 1] over seeds, example groups and languages, nan if absent.
        candidate: the same for the other model. Seed s of one is paired with seed s of the other.
        languages: the L language codes.
        primary: `mean`, or the languages of the primary measure.

    Returns:
        `languages`: for each language `n` (number of examples), the accuracies `baseline` and `candidate`, their
        `difference` (candidate minus baseline) with its 95 % interval `low` to `high`, the p-value `p` and `p_holm`,
        which Holm's method adjusts for the number of languages. With one seed and answers that are right or wrong,
        `gained` and `lost` are the numbers of questions that only the candidate or only the baseline answers correctly,
        and `p` is `mcnemar_p`. With several seeds, `by_seed` are the differences of each seed, and `seed_sd`,
        `example_sd` and `rest_sd` the standard deviations that `seed_interval` estimates. `mean`: the mean over
        languages, without `p_holm`. `primary`: the primary measure, with its name (`measure`) and `languages`. If a
        mean is of one language, its `p` is that of the language. Accuracies are fractions.
    """
    differences = candidate - baseline
    accuracies = np.nanmean(baseline, (0, 1)), np.nanmean(candidate, (0, 1))
    columns = list(range(len(languages)))
    chosen = columns if MEAN in primary else [languages.index(lang) for lang in dict.fromkeys(primary)]

    def measure(selected: list[int]) -> dict[str, Any]:
        first, second = (float(accuracy[selected].mean()) for accuracy in accuracies)
        return {"baseline": first, "candidate": second, **_difference(differences, selected)}

    by_language = {}
    for column, lang in enumerate(languages):
        entry = {"n": int((~np.isnan(baseline[0, :, column])).sum()), **measure([column])}
        values = differences[:, :, column]
        if len(values) == 1 and np.isin(values[~np.isnan(values)], (-1, 0, 1)).all():
            gained, lost = int((values == 1).sum()), int((values == -1).sum())
            p = mcnemar(gained, lost)
            entry |= {"gained": gained, "lost": lost, "mcnemar_p": p, "p": p}
        by_language[lang] = entry
    for entry, p in zip(by_language.values(), holm([entry["p"] for entry in by_language.values()]), strict=True):
        entry["p_holm"] = p
    named = MEAN if MEAN in primary else ", ".join(languages[column] for column in chosen)
    primary_entry = {"measure": named, "languages": [languages[column] for column in chosen], **measure(chosen)}
    mean = measure(columns)
    for entry, selected in ((mean, columns), (primary_entry, chosen)):
        if len(selected) == 1:
            entry["p"] = by_language[languages[selected[0]]]["p"]
    return {"languages": by_language, "mean": mean, "primary": primary_entry}


def _difference(differences: np.ndarray, columns: list[int]) -> dict[str, Any]:
    """Return the mean difference over languages with its interval and p-value; see `compare_matrices`."""
    values = reduce_languages(differences, columns)
    interval = seed_interval(values)
    if len(values) > 1:
        return {**interval._asdict(), "by_seed": values.mean(1).tolist()}
    _, _, low, high = paired_bootstrap(differences[0][:, columns])
    return {"difference": interval.difference, "low": low, "high": high, "p": interval.p}


def comparison_table(result: dict[str, Any]) -> str:
    """Format the content of `comparison.json` as a Markdown table, in percent and percentage points."""
    by_language = result["languages"]
    with_mcnemar = all("mcnemar_p" in entry for entry in by_language.values())
    tests = "gained, lost | McNemar p" if with_mcnemar else "seed SD | p" if len(result["seeds"]) > 1 else "p"
    names = ["language", "problems", "unfinished", "baseline %", "candidate %", "difference", "95 % interval", tests]
    lines = [f"| {' | '.join(names)} | Holm p |"]
    lines.append("|---|" + "---:|" * (lines[0].count("|") - 2))
    for lang, entry in by_language.items():
        counts, tests = f"{entry['n']} | {_pair(result['unfinished'][lang])}", _test_cells(entry, with_mcnemar)
        lines.append(f"| {lang} | {counts} | {_accuracy_cells(entry)} | {tests} | {entry['p_holm']:.3g} |")
    total = _pair(unfinished_totals(result))
    mean = result["mean"]
    cells = f" | {mean['p']:.3g}" if with_mcnemar else _test_cells(mean, with_mcnemar)
    lines.append(f"| **mean of languages** | | {total} | {_accuracy_cells(mean)} | {cells} | |")
    return "\n".join(lines)


def verdict(entry: Mapping[str, Any]) -> str:
    """State in words whether a difference is beyond noise: that of problems, and of seeds if there are several.

    Args:
        entry: the 95 % interval of the difference, `low` to `high`; its p-value `p`, if known; `p_holm` if it is one of
            several comparisons, and `by_seed` if it covers several seeds.
    """
    if entry["low"] <= 0 <= entry["high"]:
        return "no difference beyond noise"
    direction = "higher" if entry["low"] > 0 else "lower"
    if entry.get("p", 0) > SIGNIFICANCE_LEVEL:  # interval and test use different methods
        return f"{direction} by the interval, but not by the test"
    if entry.get("p_holm", 0) > SIGNIFICANCE_LEVEL:
        return f"{direction} before Holm's correction only"
    return f"{direction} beyond noise" if "by_seed" in entry else f"{direction} beyond the noise of problems"


def primary_sentence(result: dict[str, Any]) -> str:
    """State the result of the primary measure and what its interval covers."""
    entry, seeds = result["primary"], len(result["seeds"])
    name = "the mean of all languages" if entry["measure"] == MEAN else f"the mean of {entry['measure']}"
    points = "{:+.1f} points, {:+.1f} to {:+.1f}".format(*(100 * entry[key] for key in ("difference", "low", "high")))
    sentence = f"Primary measure, {name}: {points}, p = {entry['p']:.3g}: {verdict(entry)}."
    if seeds == 1:
        return f"{sentence} One seed: the interval covers the choice of problems, not that of the seed."
    by_seed = ", ".join(f"{100 * value:+.1f}" for value in entry["by_seed"])
    return f"{sentence} The interval covers the choice of problems and of seeds. By seed: {by_seed}."


def unfinished_totals(result: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of unfinished responses of baseline and candidate in a comparison."""
    counts = result["unfinished"].values()
    return sum(baseline for baseline, _ in counts), sum(candidate for _, candidate in counts)


def unfinished_summary(result: dict[str, Any]) -> str:
    """Describe in one sentence how many responses of each model are unfinished."""
    baseline, candidate = unfinished_totals(result)
    first, second = result["responses"]
    responses = f"{first} responses of each model" if first == second else f"{first} and {second} responses"
    return (
        f"Of the {responses}, {baseline} of the baseline and {candidate} of the candidate are unfinished (cut at the "
        f"token limit). Both models ran in {result['dtype']}."
    )


def settings_warning(result: dict[str, Any]) -> str:
    """Return a sentence about the settings in which the evaluations differ, or an empty string."""
    parts = [f"{name} ({', '.join(map(str, values))})" for name, values in result["different_settings"].items()]
    if not parts:
        return ""
    return f"**The evaluations differ in {'; '.join(parts)}, so the difference is not one of the models alone.**"


def _pair(counts: Sequence[int]) -> str:
    return f"{counts[0]}, {counts[1]}"


def _accuracy_cells(entry: dict[str, Any]) -> str:
    points = [100 * entry[key] for key in ("baseline", "candidate", "difference", "low", "high")]
    return "{:.1f} | {:.1f} | {:+.1f} | {:+.1f} to {:+.1f}".format(*points)


def _test_cells(entry: dict[str, Any], with_mcnemar: bool) -> str:
    if with_mcnemar:
        return f"{entry['gained']}, {entry['lost']} | {entry['mcnemar_p']:.3g}"
    return f"{percent(entry['seed_sd'])} | {entry['p']:.3g}" if "by_seed" in entry else f"{entry['p']:.3g}"


def write_comparison(result: dict[str, Any], output: Path) -> str:
    """Write `comparison.json` and `comparison.md` into a directory and return the text.

    Raises:
        UserError: the directory cannot be written.
    """
    left_out = f"\n\n{result['left_out']} records that a run lacks were left out." if result["left_out"] else ""
    heading = f"# {' '.join(result['candidate'])} against {' '.join(result['baseline'])}"
    table = f"{comparison_table(result)}{left_out}"
    sentences = [unfinished_summary(result), settings_warning(result), primary_sentence(result)]
    text = "\n\n".join([heading, *filter(None, sentences), table]) + "\n"
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "comparison.md", text)
        write_atomically(output / "comparison.json", json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    return text


def main() -> None:
    """Run the command line."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=description)
    runs = "directory of a run or its generations.jsonl; several if there are several seeds"
    parser.add_argument("--baseline", type=Path, nargs="+", required=True, help=runs)
    parser.add_argument("--candidate", type=Path, nargs="+", required=True, help=f"{runs}, in the same order")
    parser.add_argument("--output", type=Path, required=True, help="directory for the two result files")
    parser.add_argument(
        "--primary", nargs="+", default=[MEAN], help="measure named beforehand: mean (default), or languages to average"
    )
    args = parser.parse_args()
    text = write_comparison(compare_runs(args.baseline, args.candidate, args.primary), args.output)
    print(f"{text}\nwritten: {args.output}/comparison.json, comparison.md")


if __name__ == "__main__":
    exit_cleanly(main)

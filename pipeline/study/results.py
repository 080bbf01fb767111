"""Choose settings by the trials of a study, and compare its variants on the test split."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipeline.common.atomic_io import read_json_or_none, write_atomically, write_json
from pipeline.common.errors import UserError
from pipeline.compare import MEAN, compare_runs, write_comparison
from pipeline.evaluation.accuracy import percent
from pipeline.evaluation.significance import holm
from pipeline.study.plan import read_variants, trial_arguments
from pipeline.study.settings import CHOICES, CHOICES_FILE, RESULTS_FILE, StudySettings


def choose_settings(study: StudySettings) -> dict[str, Any]:
    """Select the trial of each variant with the highest accuracy on the development split.

    The measure is the primary one. Of equal trials, the first is selected. A choice that has been made is kept.

    Returns:
        For each variant, the `accuracy` of each trial and the `arguments` of the selected one.

    Raises:
        UserError: a trial has not been evaluated.
    """
    _, factors, variants = read_variants()
    path = study.root / CHOICES / CHOICES_FILE
    choices: dict[str, Any] = read_json_or_none(path) or {}
    for name in study.variants:
        if name not in choices:
            accuracies = [primary_accuracy(study, study.trial(name, n)) for n in range(1, len(factors) + 1)]
            best = accuracies.index(max(accuracies))
            arguments = trial_arguments(study, variants[name], factors[best])
            choices[name] = {"accuracy": accuracies, "arguments": arguments}
    write_json(path, choices)
    for name, choice in choices.items():
        write_atomically(study.choice(name), "".join(f"{argument}\n" for argument in choice["arguments"]))
        print(f"{name}: {' '.join(choice['arguments'])} (trials: {', '.join(map(percent, choice['accuracy']))} %)")
    return choices


def primary_accuracy(study: StudySettings, run: Path) -> float:
    """Return the accuracy of a run by the primary measure.

    Raises:
        UserError: the run has not been evaluated, or lacks a language.
    """
    evaluation = read_json_or_none(run / "evaluation.json")
    if evaluation is None:
        raise UserError(f"{run}: no evaluation.json; evaluate it first")
    scores = evaluation["languages"]
    names = list(scores) if MEAN in study.primary else study.primary
    try:
        return fmean(scores[lang]["accuracy"] for lang in names)
    except KeyError as error:
        raise UserError(f"{run}: no language {error} in its evaluation, but --primary names it") from None


def compare_variants(study: StudySettings) -> str:
    """Compare every variant with the baseline over all seeds. Write results.json, results.md and a comparison each.

    Holm's method adjusts the p-values of the primary measure for the number of variants.

    Returns:
        The text of results.md.
    """
    baseline, _, _ = read_variants()
    runs = {name: [study.run(name, seed) for seed in study.seeds] for name in study.variants}
    choices = read_json_or_none(study.root / CHOICES / CHOICES_FILE) or {}
    rows: dict[str, dict[str, Any]] = {}
    if study.base:
        rows["base"] = {"accuracy": [primary_accuracy(study, study.base)]}
    for name, paths in runs.items():
        rows[name] = {"accuracy": [primary_accuracy(study, path) for path in paths]}
        if name in choices:
            rows[name]["arguments"] = choices[name]["arguments"]
        if name != baseline:
            comparison = compare_runs(runs[baseline], paths, study.primary)
            write_comparison(comparison, study.root / name)
            rows[name] |= {key: comparison["primary"][key] for key in ("difference", "low", "high", "p")}
    compared = [row for row in rows.values() if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p_holm"] = p
    result = {"baseline": baseline, "primary": list(study.primary), "seeds": list(study.seeds), "variants": rows}
    text = _format(result, study)
    write_atomically(study.root / RESULTS_FILE, json.dumps(result, indent=2) + "\n")
    write_atomically(study.root / "results.md", text)
    return text


def _format(result: dict[str, Any], study: StudySettings) -> str:
    primary = "mean of all languages" if MEAN in study.primary else f"mean of {', '.join(study.primary)}"
    seeds = len(study.seeds)
    covers = "problems and seeds" if seeds > 1 else "problems, not of the seed"
    tuned = f"chosen on `{study.dev}`, with the same number of trials each" if study.dev else "those of the recipe"
    lines = [
        f"# Variants of {study.model or study.recipe}",
        "",
        f"Primary measure, fixed before the first result: accuracy on `{study.test}`, {primary}. Seeds: "
        f"{', '.join(map(str, study.seeds))}. Settings: {tuned}. The intervals (95 %) cover the choice of {covers}; "
        "Holm p is adjusted for the number of variants.",
        "",
        f"| variant | accuracy % | SD of seeds | minus {result['baseline']} | 95 % interval | p | Holm p | chosen |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in result["variants"].items():
        values = row["accuracy"]
        cells = [percent(fmean(values)), percent(stdev(values) if len(values) > 1 else None)]
        if "p" in row:
            low, high = (f"{100 * row[key]:+.1f}" for key in ("low", "high"))
            cells += [f"{100 * row['difference']:+.1f}", f"{low} to {high}", f"{row['p']:.3g}", f"{row['p_holm']:.3g}"]
        else:
            cells += [""] * 4
        chosen = " ".join(row.get("arguments", []))
        lines.append(f"| {name} | {' | '.join(cells)} | {f'`{chosen}`' if chosen else ''} |")
    return "\n".join(lines) + "\n"

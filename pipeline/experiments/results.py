"""Tables and plot of an experiment: differences from plain fine-tuning, paired by seed, with 95 % intervals."""

import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.common.atomic_io import write_atomically, write_json
from pipeline.common.errors import UserError
from pipeline.common.plotting import BLUE, GREY, INK, ORANGE, add_axes, new_figure, png, title
from pipeline.evaluation.accuracy import versions
from pipeline.experiments.analysis import (
    PRIMARY,
    Comparison,
    Results,
    detectable_difference,
    differences,
    interval,
    read_results,
    run_comparisons,
    values_csv,
)
from pipeline.experiments.plan import BASELINE, Contrast, ExperimentPlan
from pipeline.experiments.screening import chosen_yaml, judge_trials, screening_table

# Headings of the measures that are shown in percent, and of the measures that are shown unscaled.
FRACTION_HEADINGS = {
    "low_unseen": "held-out combinations",
    "low_seen": "seen combinations",
    "low": "low-resource",
    "mid": "mid",
    "pivot": "pivot",
    "confusion": "foreign words",
}
MECHANISM_HEADINGS = {
    "word_cosine": "words, cosine",
    "word_centred_cosine": "words, centered cosine",
    "final_cosine": "final layer, cosine",
    "final_centred_cosine": "final layer, centered cosine",
    "final_silhouette": "final layer, silhouette",
    "soft_token_entropy": "entropy of p",
}
MIN_SEEN_ACCURACY = 0.95  # sanity check: the baseline must have learned the seen combinations with every seed
MIN_SEEDS = 3  # minimum number of seeds to show an interval
SIGNIFICANT = 0.05


def write_experiment_results(plan: ExperimentPlan, output: Path) -> str:
    """Write results.csv, results.md, results.json and results.png, and return the Markdown.

    In a screening, chosen.yaml is also written.

    Raises:
        UserError: the baseline has no results yet.
    """
    results = read_results(output)
    worlds = [world for world in plan.worlds if results.get((BASELINE, world))]
    if not worlds:
        raise UserError(f"{output}: no results of {BASELINE!r} yet; run python -m pipeline.experiments")
    comparisons = run_comparisons(plan, results)
    tables = [primary_table(comparisons)] if plan.primary else []
    for world in worlds:
        tables += [accuracy_table(plan, results, comparisons, world), mechanism_table(plan, results, world)]
    if plan.chosen is None and (trials := judge_trials(plan, results, worlds[0])):
        tables.append(screening_table(trials))
        write_atomically(output / "chosen.yaml", chosen_yaml(plan, trials).encode())
    text = "\n\n".join(tables)
    write_atomically(output / "results.csv", values_csv(results).encode())
    write_atomically(output / "results.md", f"{text}\n".encode())
    write_json(output / "results.json", summarize_results(comparisons, results))
    write_atomically(output / "results.png", plot_results(plan, results, worlds[0]))
    return text


def primary_table(comparisons: list[Comparison]) -> str:
    """Format the primary contrasts."""
    lines = [
        f"Primary: {FRACTION_HEADINGS[PRIMARY]}, points; p after Holm's correction over these rows",
        "",
        "| contrast | world | seeds | difference | found with 80 % power | p |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for comparison in comparisons:
        if comparison.primary:
            contrast = comparison.contrast
            difference = _difference(comparison, 1)
            lines.append(
                f"| {contrast.variant} - {contrast.baseline} | {contrast.world} | {comparison.seeds} | {difference} | "
                f"{100 * detectable_difference(comparison):.1f} | {_p_value(comparison.p_holm)} |"
            )
    return "\n".join(lines)


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _difference(comparison: Comparison, digits: int) -> str:
    """Format a difference in points, with its interval if there are enough seeds."""
    mean, low, high = (100 * value for value in comparison.interval)
    bounds = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if comparison.seeds >= MIN_SEEDS else ""
    return f"{mean:+.{digits}f}{bounds}"


def accuracy_table(plan: ExperimentPlan, results: Results, comparisons: list[Comparison], world: str) -> str:
    """Format the accuracy of the baseline in one world, and the differences of each variant from it.

    An asterisk marks a difference whose p-value after Holm's correction is below 5 %.
    """
    models = results[BASELINE, world]
    means = {key: 100 * fmean(metrics[key] for metrics in models.values()) for key in FRACTION_HEADINGS}
    floor = 100 * fmean(metrics["floor"] for metrics in models.values())
    lines = [
        f"World {world}: {plan.worlds[world].pairs} pairs per low-resource language, {len(models)} seeds, percent. "
        f"Always using the seen sign gives {floor:.1f} on held-out combinations",
        "",
        f"| variant | seeds | {' | '.join(FRACTION_HEADINGS.values())} |",
        "|---|---:|" + "---|" * len(FRACTION_HEADINGS),
        f"| {BASELINE} | {len(models)} | " + " | ".join(f"{mean:.1f}" for mean in means.values()) + " |",
    ]
    for variant in plan.variants_of(world):
        own = {c.measure: c for c in comparisons if c.contrast == Contrast(variant, BASELINE, world)}
        if own:
            cells = [
                _difference(own[key], 1)
                + ("*" if own[key].p_holm < SIGNIFICANT and own[key].seeds >= MIN_SEEDS else "")
                for key in FRACTION_HEADINGS
            ]
            lines.append(f"| {variant} | {own[PRIMARY].seeds} | " + " | ".join(cells) + " |")
    failed = sorted(seed for seed, metrics in models.items() if metrics["low_seen"] < MIN_SEEN_ACCURACY)
    if failed:
        lines += [
            "",
            f"Sanity check failed: {BASELINE} has not learned the seen combinations ({MIN_SEEN_ACCURACY:.0%}) with "
            f"{len(failed)} of {len(models)} seeds: {', '.join(map(str, failed))}.",
        ]
    return "\n".join(lines)


def mechanism_table(plan: ExperimentPlan, results: Results, world: str) -> str:
    """Format the mean of each measure of representations, of the entropy of p, and of the share of the gradient.

    Means are over the seeds that all variants with results have.
    """
    trained = {variant: results[variant, world] for variant in plan.variants_of(world) if (variant, world) in results}
    seeds = sorted(set.intersection(*(set(models) for models in trained.values())))
    if not seeds:
        return f"World {world}: no seed has results of all variants, so there is no table of representations"
    lines = [
        f"World {world}: representations after training, means over the {len(seeds)} seeds that all variants have",
        "",
        f"| variant | {' | '.join(MECHANISM_HEADINGS.values())} | share of the gradient |",
        "|---|" + "---:|" * (len(MECHANISM_HEADINGS) + 1),
    ]
    for variant, models in trained.items():
        cells = [f"{fmean(models[seed][key] for seed in seeds):.2f}" for key in MECHANISM_HEADINGS]
        shares = [models[seed]["gradient_share"] for seed in seeds if "gradient_share" in models[seed]]
        lines.append(f"| {variant} | {' | '.join(cells)} | {f'{fmean(shares):.2f}' if shares else ''} |")
    return "\n".join(lines)


def summarize_results(comparisons: list[Comparison], results: Results) -> dict[str, Any]:
    """Return the content of results.json: all comparisons, and the mean of each measure by world and variant."""
    means: dict[str, Any] = {}
    for (variant, world), models in results.items():
        names = [name for name, value in next(iter(models.values())).items() if isinstance(value, float)]
        means.setdefault(world, {})[variant] = {
            name: fmean(metrics[name] for metrics in models.values()) for name in names
        }
    rows = [
        {**asdict(c.contrast), **c.interval._asdict(), "measure": c.measure, "seeds": c.seeds, "p": c.p,
         "p_holm": c.p_holm, "primary": c.primary}
        for c in comparisons
    ]  # fmt: skip
    return {"versions": versions(), "comparisons": rows, "means": means}


def plot_results(plan: ExperimentPlan, results: Results, world: str) -> bytes:
    """Plot the accuracy on held-out combinations in one world, as PNG: a dot per seed, and the mean of each variant."""
    variants = [variant for variant in plan.variants_of(world) if (variant, world) in results]
    figure = new_figure(9, 0.32 * len(variants) + 1.6)
    axes = add_axes(figure, figure.add_gridspec(1, 1)[0, 0])
    baseline = results[BASELINE, world]
    for row, variant in enumerate(reversed(variants)):
        values = {seed: 100 * metrics[PRIMARY] for seed, metrics in results[variant, world].items()}
        axes.scatter(list(values.values()), [row] * len(values), s=12, color=GREY, alpha=0.6, linewidths=0)
        mean = fmean(values.values())
        gains = [100 * value for value in differences(results, Contrast(variant, BASELINE, world), PRIMARY)]
        above = len(gains) >= MIN_SEEDS and interval(gains).low > 0
        axes.scatter([mean], [row], s=55, marker="D", color=ORANGE if above else BLUE, zorder=3)
        axes.text(104, row, f"{mean:.0f}", va="center", fontsize=9, color=INK)
    floor = 100 * fmean(metrics["floor"] for metrics in baseline.values())
    for x, name in ((floor, "guess"), (100 * fmean(m[PRIMARY] for m in baseline.values()), BASELINE)):
        if not math.isnan(x):
            axes.axvline(x, color=GREY, linewidth=0.8, linestyle="--")
            axes.text(x, len(variants) - 0.4, name, fontsize=8, color=GREY, ha="right" if name == "guess" else "left")
    axes.set_xlim(-2, 110)
    axes.set_ylim(-0.6, len(variants) - 0.1)
    axes.set_yticks(range(len(variants)), list(reversed(variants)))
    axes.set_xlabel(f"accuracy on held-out combinations, %; dots: seeds; orange: above {BASELINE}, interval above 0")
    title(axes, f"World {world}: what is learned from the other languages")
    return png(figure)

"""Tables of an experiment: difference of each variant from plain fine-tuning, paired by seed, with 95 % intervals."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from pipeline.common.atomic_io import write_atomically, write_json
from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional
from pipeline.common.plotting import GREY, RUN_COLORS, add_axes, new_figure, png, title
from pipeline.evaluation.accuracy import versions
from pipeline.experiments.plan import BASELINE, ExperimentPlan

# Headings of the metrics that are shown in percent, and of the metrics that are shown unscaled.
FRACTION_HEADINGS = {
    "low": "low-resource",
    "low_seen": "seen combinations",
    "low_unseen": "held-out combinations",
    "mid": "mid",
    "pivot": "pivot",
    "consistency": "same answer as pivot",
    "confusion": "foreign words",
}
REPRESENTATION_HEADINGS = {
    "final_centred_cosine": "final layer, centered cosine",
    "final_silhouette": "final layer, silhouette",
    "soft_tokens_centred_cosine": "soft tokens, centered cosine",
    "soft_tokens_silhouette": "soft tokens, silhouette",
    "word_centred_cosine": "word embeddings, centered cosine",
}
# Sanity check: the baseline's mean low-resource accuracy (in percent) must leave room for differences.
BASELINE_ACCURACY_RANGE = (0.25, 0.80)

MIN_SEEDS = 3  # minimum number of seeds to show an interval

ModelMetrics = dict[str, Any]  # metrics of one model, as written by `Study`
Results = dict[tuple[str, int], dict[int, ModelMetrics]]  # by variant and amount, then by seed


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float


def interval(values: list[float]) -> Interval:
    """Compute the mean and its confidence interval. The bounds are NaN for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = import_optional("scipy.stats").t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def read_results(output: Path) -> Results:
    """Read the metrics of all models in an output directory."""
    results: Results = {}
    for path in sorted(output.glob("seed-*/*-*.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault((metrics["arm"], metrics["amount"]), {})[metrics["seed"]] = metrics
    return results


def differences(results: Results, variant: str, amount: int, key: str) -> list[float]:
    """Return the differences of a metric between a variant and the baseline, for the seeds that have both."""
    models, baseline = results.get((variant, amount), {}), results.get((BASELINE, amount), {})
    return [models[seed][key] - baseline[seed][key] for seed in sorted(models.keys() & baseline.keys())]


def write_experiment_results(plan: ExperimentPlan, output: Path) -> str:
    """Write results.md, results.json and results.png, and return the Markdown.

    Raises:
        UserError: the baseline has no results yet.
    """
    results = read_results(output)
    amounts = [amount for amount in plan.amounts if results.get((BASELINE, amount))]
    if not amounts:
        raise UserError(f"{output}: no results of {BASELINE!r} yet; run python -m pipeline.experiments")
    tables = []
    for amount in amounts:
        tables.append(markdown_table(plan, results, amount, FRACTION_HEADINGS, scale=100, digits=1))
        tables.append(markdown_table(plan, results, amount, REPRESENTATION_HEADINGS, scale=1, digits=2))
    text = "\n\n".join(tables)
    write_atomically(output / "results.md", f"{text}\n".encode())
    write_json(output / "results.json", summarize_results(plan, results, amounts))
    write_atomically(output / "results.png", plot_results(plan, results, amounts))
    return text


def markdown_table(
    plan: ExperimentPlan, results: Results, amount: int, headings: dict[str, str], scale: float, digits: int
) -> str:
    """Format the means of the baseline, and the differences of each variant from it with intervals.

    Args:
        plan: the plan, which gives the order of the variants.
        results: metrics of all models.
        amount: pairs per low-resource language.
        headings: column heading of each metric.
        scale: factor that the metrics are multiplied by; 100 for percent.
        digits: number of digits after the decimal point.
    """
    models = results[BASELINE, amount]
    lines = [
        f"{amount} pairs per low-resource language, {len(models)} seeds" + (", percent" if scale == 100 else ""),
        "",
        f"| variant | {' | '.join(headings.values())} |",
        "|---|" + "---|" * len(headings),
    ]
    means = {key: fmean(metrics[key] for metrics in models.values()) * scale for key in headings}
    lines.append(f"| {BASELINE} | " + " | ".join(f"{mean:.{digits}f}" for mean in means.values()) + " |")
    for variant in plan.variants:
        cells = []
        for key in headings:
            if values := [scale * value for value in differences(results, variant, amount, key)]:
                mean, low, high = interval(values)
                bounds = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if len(values) >= MIN_SEEDS else ""
                cells.append(f"{mean:+.{digits}f}{bounds}")
        if variant != BASELINE and cells:
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    low, high = (100 * bound for bound in BASELINE_ACCURACY_RANGE)
    if "low" in means and not low <= means["low"] <= high:
        lines += [
            "",
            f"Sanity check failed: the low-resource accuracy of {BASELINE} is {means['low']:.1f} %. Outside "
            f"{low:.0f} to {high:.0f} %, the variants differ little.",
        ]
    return "\n".join(lines)


def summarize_results(plan: ExperimentPlan, results: Results, amounts: Sequence[int]) -> dict[str, Any]:
    """Compute the content of results.json: means, differences and intervals by amount and variant."""
    keys = [*FRACTION_HEADINGS, *REPRESENTATION_HEADINGS]
    summary: dict[str, Any] = {"versions": versions(), "amounts": {}}
    for amount in amounts:
        by_variant = summary["amounts"][str(amount)] = {}
        for variant in plan.variants:
            if (variant, amount) not in results:
                continue
            models = results[variant, amount]
            by_variant[variant] = {
                "seeds": sorted(models),
                "mean": {key: fmean(metrics[key] for metrics in models.values()) for key in keys},
                "minus_sft": {key: interval(differences(results, variant, amount, key))._asdict() for key in keys},
            }
    return summary


def plot_results(plan: ExperimentPlan, results: Results, amounts: Sequence[int]) -> bytes:
    """Plot the difference in low-resource accuracy from plain fine-tuning, by variant and amount, as PNG."""
    figure = new_figure(9, 3.6)
    grid = figure.add_gridspec(1, 2)
    for column, (key, name) in enumerate({"low": "all problems", "low_unseen": "held-out combinations"}.items()):
        axes = add_axes(figure, grid[0, column])
        _draw_differences(axes, plan, results, amounts, key)
        title(axes, f"Low-resource accuracy, {name}")
        if column == 0:
            axes.legend(frameon=False, fontsize=8)
    return png(figure)


def _draw_differences(axes: Axes, plan: ExperimentPlan, results: Results, amounts: Sequence[int], key: str) -> None:
    variants = [variant for variant in plan.variants if variant != BASELINE]
    width = 0.8 / len(amounts)
    for i, amount in enumerate(amounts):
        for position, variant in enumerate(variants):
            values = [100 * value for value in differences(results, variant, amount, key)]
            if not values:
                continue
            mean, low, high = interval(values)
            x = position + (i - (len(amounts) - 1) / 2) * width
            axes.bar(x, mean, width * 0.92, color=RUN_COLORS[i], label=f"{amount} pairs" if position == 0 else None)
            if len(values) >= MIN_SEEDS:
                axes.errorbar(x, mean, [[mean - low], [high - mean]], color="black", linewidth=0.8, capsize=2)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(variants)), [variant.replace("_", "\n") for variant in variants], fontsize=7)
    axes.set_ylabel("points over sft")

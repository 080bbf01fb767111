"""The tables of the experiment: every arm minus plain fine-tuning, paired by seed, with 95 % intervals."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from pipeline.common.atomic_io import write_atomically, write_json
from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional
from pipeline.common.plotting import GREY, RUN_COLORS, axes_of, figure_of, png, title
from pipeline.evaluation.accuracy import versions
from pipeline.experiments.plan import BASELINE, Plan

# Figures in percent, and figures as they are, with their headings.
SHARES = {
    "low": "low-resource",
    "low_seen": "its seen cells",
    "low_unseen": "its unseen cells",
    "mid": "mid",
    "pivot": "pivot",
    "consistency": "same answer as pivot",
    "confusion": "foreign words",
}
STATES = {
    "final_centred_cosine": "final layer, centred cosine",
    "final_silhouette": "final layer, silhouette",
    "soft_tokens_centred_cosine": "soft tokens, centred cosine",
    "soft_tokens_silhouette": "soft tokens, silhouette",
    "word_centred_cosine": "word embeddings, centred cosine",
}
LOW_GATE = (0.25, 0.80)  # mean accuracy of plain fine-tuning in low-resource languages, for arms to be comparable

FEWEST = 3  # seeds for an interval to be shown

Figures = dict[str, Any]  # of one model, as study.py writes them
Found = dict[tuple[str, int], dict[int, Figures]]  # by arm and amount, by seed


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float


def interval(values: list[float]) -> Interval:
    """NaN bounds for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = import_optional("scipy.stats").t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def read_figures(output: Path) -> Found:
    """All results below a directory."""
    found: Found = {}
    for path in sorted(output.glob("seed-*/*-*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((figures["arm"], figures["amount"]), {})[figures["seed"]] = figures
    return found


def differences(found: Found, arm: str, amount: int, key: str) -> list[float]:
    """Arm minus baseline, of the seeds that have both."""
    ours, base = found.get((arm, amount), {}), found.get((BASELINE, amount), {})
    return [ours[seed][key] - base[seed][key] for seed in sorted(ours.keys() & base.keys())]


def write_results(plan: Plan, output: Path) -> str:
    """Write results.md, results.json and results.png; returns the Markdown.

    Raises UserError where nothing was run.
    """
    found = read_figures(output)
    amounts = [a for a in plan.amounts if found.get((BASELINE, a))]
    if not amounts:
        raise UserError(f"{output}: no results of the arm {BASELINE!r} yet; run python -m pipeline.experiments")
    text = "\n\n".join(
        [
            table(plan, found, amount, SHARES, 100, 1) + "\n\n" + table(plan, found, amount, STATES, 1, 2)
            for amount in amounts
        ]
    )
    write_atomically(output / "results.md", f"{text}\n".encode())
    write_json(output / "results.json", summary(plan, found, amounts))
    write_atomically(output / "results.png", picture(plan, found, amounts))
    return text


def table(plan: Plan, found: Found, amount: int, headings: dict[str, str], scale: float, digits: int) -> str:
    """Markdown: the baseline's means, then differences to it with intervals."""
    seeds = len(found[BASELINE, amount])
    lines = [
        f"{amount} pairs per low-resource language, {seeds} seeds" + (", percent" if scale == 100 else ""),
        "",
        "| arm | " + " | ".join(headings.values()) + " |",
        "|---|" + "---|" * len(headings),
    ]
    base = {key: fmean(f[key] for f in found[BASELINE, amount].values()) * scale for key in headings}
    lines.append(f"| {BASELINE} | " + " | ".join(f"{base[key]:.{digits}f}" for key in headings) + " |")
    for arm in plan.arms:
        cells = []
        for key in headings:
            values = [scale * d for d in differences(found, arm, amount, key)]
            if values:
                mean, low, high = interval(values)
                bounds = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if len(values) >= FEWEST else ""
                cells.append(f"{mean:+.{digits}f}{bounds}")
        if arm != BASELINE and cells:
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    accuracy = base.get("low")
    if accuracy is not None and not LOW_GATE[0] * 100 <= accuracy <= LOW_GATE[1] * 100:
        lines += [
            "",
            f"Gate missed: {BASELINE} at {accuracy:.1f} % in low-resource languages; arms differ little there.",
        ]
    return "\n".join(lines)


def summary(plan: Plan, found: Found, amounts: list[int]) -> dict[str, Any]:
    """Means, differences and intervals for programs."""
    keys = [*SHARES, *STATES]
    result: dict[str, Any] = {"versions": versions(), "amounts": {}}
    for amount in amounts:
        arms = result["amounts"][str(amount)] = {}
        for arm in plan.arms:
            if (arm, amount) not in found:
                continue
            models = found[arm, amount]
            arms[arm] = {
                "seeds": sorted(models),
                "mean": {key: fmean(f[key] for f in models.values()) for key in keys},
                "minus_sft": {key: interval(differences(found, arm, amount, key))._asdict() for key in keys},
            }
    return result


def picture(plan: Plan, found: Found, amounts: list[int]) -> bytes:
    """Accuracy in low-resource languages minus plain fine-tuning, by arm and amount, with intervals."""
    figure = figure_of(9, 3.6)
    grid = figure.add_gridspec(1, 2)
    for column, (key, name) in enumerate({"low": "all problems", "low_unseen": "unseen cells"}.items()):
        axes = axes_of(figure, grid[0, column])
        arms = [arm for arm in plan.arms if arm != BASELINE]
        width = 0.8 / len(amounts)
        for i, amount in enumerate(amounts):
            for place, arm in enumerate(arms):
                values = [100 * d for d in differences(found, arm, amount, key)]
                if not values:
                    continue
                mean, low, high = interval(values)
                x = place + (i - (len(amounts) - 1) / 2) * width
                label = f"{amount} pairs" if place == 0 else None
                axes.bar(x, mean, width * 0.92, color=RUN_COLORS[i], label=label)
                if len(values) >= FEWEST:
                    axes.errorbar(x, mean, [[mean - low], [high - mean]], color="black", linewidth=0.8, capsize=2)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(arms)), [arm.replace("_", "\n") for arm in arms], fontsize=7)
        axes.set_ylabel("points over sft")
        title(axes, f"Low-resource accuracy, {name}")
        if column == 0:
            axes.legend(frameon=False, fontsize=8)
    return png(figure)

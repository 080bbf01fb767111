"""Compare the worlds of several experiments: a table and a picture of the gains over plain fine-tuning.

    python -m pipeline.experiments.gains_by_world docs/bench/experiment.csv docs/bench/worlds.csv \\
        docs/bench/embedding_rate.csv --output docs/bench/gains_by_world.png
"""

import argparse
import csv
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.plotting import BLUE, GREY, INK, LIGHT, ORANGE, add_axes, new_figure, png, title
from pipeline.experiments.analysis import PRIMARY, Interval, Results, differences, interval
from pipeline.experiments.plan import BASELINE, Contrast

VARIANTS = {"paper": ORANGE, "hard": BLUE, "words": LIGHT}  # variants that ran in all worlds, with their colors
MIN_SEEDS = 3  # minimum number of seeds to show an interval


def read_values(paths: Iterable[Path]) -> Results:
    """Read the files that `analysis.values_csv` formats. No two of them may have a world in common.

    Raises:
        UserError: a file cannot be read, lacks a column, or has the world of another file.
    """
    results: Results = {}
    for path in paths:
        own: Results = {}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    models = own.setdefault((row["arm"], row["world"]), {})
                    models.setdefault(int(row["seed"]), {})[row["measure"]] = float(row["value"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a CSV file of an experiment ({error!r})") from None
        if both := {world for _, world in results} & {world for _, world in own}:
            raise UserError(f"{path}: the world {min(both)!r} is in another file, too")
        results |= own
    return results


def worlds_of(results: Results) -> list[str]:
    """Return the worlds with results of the baseline, in the order of the files."""
    return list(dict.fromkeys(world for variant, world in results if variant == BASELINE))


def gain(results: Results, variant: str, world: str) -> Interval | None:
    """Return the gain on held-out combinations in points, or None if no seed has both models.

    Fewer than `MIN_SEEDS` seeds have NaN as bounds.
    """
    values = [100 * value for value in differences(results, Contrast(variant, BASELINE, world), PRIMARY)]
    if not values:
        return None
    return interval(values) if len(values) >= MIN_SEEDS else Interval(fmean(values), math.nan, math.nan)


def gains_table(results: Results) -> str:
    """Format the gains as a Markdown table with one row per world."""
    lines = [f"| world | seeds | {BASELINE} | {' | '.join(VARIANTS)} |", "|---|---:|---:|" + "---|" * len(VARIANTS)]
    for world in worlds_of(results):
        models = results[BASELINE, world]
        cells = [f"{100 * fmean(metrics[PRIMARY] for metrics in models.values()):.1f}"]
        cells += [_cell(results, variant, world, len(models)) for variant in VARIANTS]
        lines.append(f"| `{world}` | {len(models)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(results: Results, variant: str, world: str, seeds: int) -> str:
    found = gain(results, variant, world)
    if found is None:
        return ""
    own = len(results[variant, world])
    bounds = "" if math.isnan(found.low) else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{found.mean:+.1f}{bounds}" + (f" ({own} of them)" if own != seeds else "")


def plot_gains(results: Results) -> bytes:
    """Plot the gains by world, as PNG: small dots for seeds, large ones for means, and lines for intervals."""
    worlds = worlds_of(results)
    figure = new_figure(9, 0.55 * len(worlds) + 1.4)
    axes = add_axes(figure, figure.add_gridspec(1, 1)[0, 0])
    for index, (variant, color) in enumerate(VARIANTS.items()):
        drawn = False
        for row, world in enumerate(reversed(worlds)):
            found, y = gain(results, variant, world), row + 0.22 * (1 - index)
            if found is None:
                continue
            values = [100 * value for value in differences(results, Contrast(variant, BASELINE, world), PRIMARY)]
            axes.scatter(values, [y] * len(values), s=9, color=color, alpha=0.45, linewidths=0)
            if not math.isnan(found.low):
                axes.plot([found.low, found.high], [y, y], color=color, linewidth=1.6)
            axes.scatter([found.mean], [y], s=42, color=color, zorder=3, label=None if drawn else variant)
            drawn = True
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(worlds)), [f"{w} ({len(results[BASELINE, w])})" for w in reversed(worlds)])
    axes.set_ylim(-0.6, len(worlds) - 0.4)
    axes.set_xlabel(f"points over {BASELINE} on held-out combinations; in brackets: seeds", color=INK)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    title(axes, "What a low-resource language learns from the other languages, by world")
    return png(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare the worlds of experiments.")
    parser.add_argument("files", type=Path, nargs="+", help="results.csv of an experiment")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    results = read_values(args.files)
    print(gains_table(results))
    write_atomically(args.output, plot_gains(results))


if __name__ == "__main__":
    exit_cleanly(main)

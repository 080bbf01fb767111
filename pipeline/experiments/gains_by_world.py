"""Compare the worlds of several experiments: a table and a picture of the gains over plain fine-tuning.

    python -m pipeline.experiments.gains_by_world docs/bench/experiment.csv docs/bench/worlds.csv \\
        docs/bench/embedding_rate.csv docs/bench/stems.csv --output docs/bench/gains_by_world.png \\
        --compare paper:shared_nouns paper:main
"""

import argparse
import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.plotting import BLUE, GREY, INK, LIGHT, ORANGE, add_axes, new_figure, png, title
from pipeline.experiments.analysis import CSV_COLUMNS, PRIMARY, Interval, Results, differences_by_seed, interval
from pipeline.experiments.plan import BASELINE, Contrast
from pipeline.experiments.results import MIN_SEEDS

VARIANTS = {"paper": ORANGE, "hard": BLUE, "words": LIGHT}  # variants to compare, with their colors


def read_values(paths: Iterable[Path]) -> Results:
    """Read the files that `analysis.values_csv` formats. No two of them may have a world in common.

    Raises:
        UserError: a file cannot be read, is not such a file, or has the world of another file.
    """
    results: Results = {}
    for path in paths:
        try:
            own = _read_file(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; give a results.csv of an experiment") from None
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path}: not a results.csv of an experiment: {error}; run it again") from None
        if both := {world for _, world in results} & {world for _, world in own}:
            raise UserError(f"{path}: the world {min(both)!r} is in another file, too; give only one of them")
        results |= own
    return results


def _read_file(path: Path) -> Results:
    results: Results = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != CSV_COLUMNS:
            raise ValueError(f"its first line is not {','.join(CSV_COLUMNS)}")
        for row in rows:
            metrics = results.setdefault((row["arm"], row["world"]), {}).setdefault(int(row["seed"]), {})
            value = float(row["value"])
            if row["measure"] in metrics or not math.isfinite(value):
                raise ValueError(
                    f"seed {row['seed']}, {row['world']}, {row['arm']}, {row['measure']}: twice, or not finite"
                )
            metrics[row["measure"]] = value
    if not any(variant == BASELINE for variant, _ in results):
        raise ValueError(f"no results of {BASELINE}")
    if any(PRIMARY not in metrics for models in results.values() for metrics in models.values()):
        raise ValueError(f"a model without {PRIMARY}")
    return results


def worlds_of(results: Results) -> list[str]:
    """Return the worlds with results of the baseline, in the order of the files."""
    return list(dict.fromkeys(world for variant, world in results if variant == BASELINE))


def gains(results: Results, variant: str, world: str) -> dict[int, float]:
    """Return the gains on held-out combinations in points, by seed, for the seeds that have both models."""
    values = differences_by_seed(results, Contrast(variant, BASELINE, world), PRIMARY)
    return {seed: round(100 * value, 6) for seed, value in values.items()}  # the files have eight digits


def mean_and_interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % interval. Fewer than `MIN_SEEDS` values have NaN as bounds."""
    return interval(values) if len(values) >= MIN_SEEDS else Interval(fmean(values), math.nan, math.nan)


def gains_table(results: Results) -> str:
    """Format the gains as a Markdown table with one row per world."""
    lines = [f"| world | seeds | {BASELINE} | {' | '.join(VARIANTS)} |", "|---|---:|---:|" + "---|" * len(VARIANTS)]
    for world in worlds_of(results):
        models = results[BASELINE, world]
        cells = [f"{100 * fmean(metrics[PRIMARY] for metrics in models.values()):.1f}"]
        cells += [_cell([*gains(results, variant, world).values()], len(models)) for variant in VARIANTS]
        lines.append(f"| `{world}` | {len(models)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], seeds: int) -> str:
    """Format the mean gain over those of the `seeds` seeds that have the variant."""
    if not values:
        return ""
    return _format(mean_and_interval(values)) + (f" ({len(values)} of them)" if len(values) != seeds else "")


def _format(found: Interval) -> str:
    bounds = "" if math.isnan(found.low) else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{found.mean:+.1f}{bounds}"


def compare(results: Results, first: str, second: str) -> str:
    """Compare two gains on the seeds that have both. Each is named VARIANT:WORLD.

    Raises:
        UserError: a name has no results, or no seed has both.
    """
    pair = []
    for name in (first, second):
        variant, _, world = name.partition(":")
        if (variant, world) not in results:
            known = ", ".join(f"{variant}:{world}" for variant, world in results)
            raise UserError(f"--compare: no results of {name!r}; the files have {known}")
        pair.append(gains(results, variant, world))
    one, other = pair
    if not (seeds := sorted(one.keys() & other)):
        raise UserError(f"--compare: {first} and {second} have no seed in common; choose others")
    means = [fmean(values[seed] for seed in seeds) for values in pair]
    difference = mean_and_interval([one[seed] - other[seed] for seed in seeds])
    return (
        f"{first} {means[0]:+.1f}, {second} {means[1]:+.1f}, difference {_format(difference)} ({len(seeds)} seeds: "
        f"{', '.join(map(str, seeds))})"
    )


def plot_gains(results: Results) -> bytes:
    """Plot the gains by world, as PNG: small dots for seeds, large ones for means, and bars for intervals."""
    worlds = worlds_of(results)
    figure = new_figure(9, 0.55 * len(worlds) + 1.6)
    axes = add_axes(figure, figure.add_gridspec(1, 1)[0, 0])
    axes.grid(axis="y", visible=False)
    for index, (variant, color) in enumerate(VARIANTS.items()):
        for row, world in enumerate(reversed(worlds)):
            values, y = [*gains(results, variant, world).values()], row + 0.24 * (1 - index)
            if not values:
                continue
            found = mean_and_interval(values)
            if not math.isnan(found.low):
                axes.plot([found.low, found.high], [y, y], color=color, linewidth=5, alpha=0.3, solid_capstyle="butt")
            axes.scatter(values, [y] * len(values), s=9, color=color, zorder=3, linewidths=0)
            face = "white" if math.isnan(found.low) else color
            axes.scatter([found.mean], [y], s=42, edgecolors=color, facecolors=face, zorder=4)
        axes.scatter([], [], s=42, color=color, label=variant)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(worlds)), [f"{w} ({len(results[BASELINE, w])})" for w in reversed(worlds)])
    axes.set_ylim(-0.6, len(worlds) - 0.4)
    text = f"points over {BASELINE} on held-out combinations. Small dots: seeds; large: means; bars: 95 % intervals;\n"
    text += f"hollow: fewer than {MIN_SEEDS} seeds. In brackets: seeds of {BASELINE}"
    axes.set_xlabel(text, color=INK, fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    title(axes, "Gain over plain fine-tuning by world")
    return png(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare the worlds of experiments.")
    parser.add_argument("files", type=Path, nargs="+", help="results.csv of an experiment")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar="VARIANT:WORLD",
        help="two gains to compare on the seeds that have both; may be given several times",
    )
    args = parser.parse_args()
    ensure_writable(args.output.parent)
    results = read_values(args.files)
    comparisons = [compare(results, *names) for names in args.compare]
    print("\n".join([gains_table(results), *comparisons]))
    write_atomically(args.output, plot_gains(results))


if __name__ == "__main__":
    exit_cleanly(main)

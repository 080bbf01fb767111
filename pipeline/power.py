"""Estimate before training how many examples and seeds are needed to detect a difference in accuracy.

    python -m pipeline.power --difference 3.8 --discordance 20 --examples 250 500 1000 --seeds 1 3 5 --seed_sd 1.5
    python -m pipeline.power --difference 2 --comparison runs/pilot/solar/comparison.json

The power is the probability that `pipeline.compare` finds p < 0.05 for its primary measure.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.seed_intervals import half_width

ALPHA = 0.05
DRAWS = 20_000
MOST_EXAMPLES = 1_000_000


class Spread(NamedTuple):
    """Standard deviations of the difference between two models, as fractions; see `seed_intervals`."""

    seed_sd: float
    example_sd: float
    rest_sd: float


def spread_of_discordance(difference: float, discordance: float, seed_sd: float, correlation: float) -> Spread:
    """Return the spread of differences that are -1, 0 or 1.

    Args:
        difference: mean difference in accuracy.
        discordance: fraction of examples that only one of the models answers correctly.
        seed_sd: standard deviation of the difference between seeds, apart from that due to the choice of examples.
        correlation: correlation between the differences of two seeds on the same example.

    Raises:
        UserError: the difference is larger than the discordance allows.
    """
    if not abs(difference) <= discordance <= 1:
        raise UserError("--discordance: must be at least the difference, and at most 100")
    variance = discordance - difference**2
    return Spread(seed_sd, (correlation * variance) ** 0.5, ((1 - correlation) * variance) ** 0.5)


def simulate_power(difference: float, spread: Spread, seeds: int, examples: int) -> float:
    """Simulate how often the interval of `seed_interval` excludes 0, with normal effects.

    The mean squares of a balanced table of normal effects are independent of each other and of the mean, so they are
    drawn instead of the table.
    """
    rng = np.random.default_rng(0)
    seed, example, rest = (sd**2 for sd in spread)

    def mean_square(expected: float, freedom: int) -> np.ndarray:
        return expected * rng.chisquare(freedom, DRAWS) / freedom

    mean = difference + rng.normal(size=DRAWS) * (seed / seeds + example / examples + rest / (seeds * examples)) ** 0.5
    if seeds == 1:
        squares = (np.zeros(DRAWS), mean_square(example + rest, examples - 1), np.zeros(DRAWS))
    else:
        squares = (
            mean_square(examples * seed + rest, seeds - 1),
            mean_square(seeds * example + rest, examples - 1),
            mean_square(rest, (seeds - 1) * (examples - 1)),
        )
    return float(np.mean(np.abs(mean) > half_width(*squares, (seeds, examples), ALPHA)))


def mcnemar_power(difference: float, discordance: float, examples: int) -> float:
    """Return the power of McNemar's exact test of one pair of runs, by summation over all outcomes."""
    binomial = import_optional("scipy.stats").binom
    discordant = np.arange(1, examples + 1)
    # The test rejects if the smaller count is at most this threshold, which is -1 if no count is small enough.
    threshold = binomial.ppf(ALPHA / 2, discordant, 0.5) - 1
    gained = binomial(discordant, (discordance + difference) / (2 * discordance))
    rejects = gained.cdf(threshold) + gained.sf(discordant - threshold - 1)
    return float(binomial.pmf(discordant, examples, discordance) @ rejects)


def examples_for_power(difference: float, spread: Spread, seeds: int, power: float) -> int | None:
    """Return the smallest number of examples with at least this power, to within 1 %, or None if there is none."""
    low, high = 2, MOST_EXAMPLES
    if simulate_power(difference, spread, seeds, high) < power:
        return None
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        enough = simulate_power(difference, spread, seeds, middle) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def power_table(
    difference: float, spread: Spread, seeds: Sequence[int], examples: Sequence[int], power: float
) -> list[str]:
    """Format the power for each number of seeds and examples as a Markdown table, in percent."""
    columns = [f"{count:,} examples" for count in examples]
    lines = [f"| seeds | {' | '.join(columns)} | examples for {100 * power:.0f} % | significant by chance |"]
    lines.append("|---:|" + "---:|" * (len(columns) + 2))
    for count in seeds:
        cells = [f"{100 * simulate_power(difference, spread, count, number):.0f} %" for number in examples]
        needed = examples_for_power(difference, spread, count, power)
        chance = max(simulate_power(0.0, spread, count, number) for number in examples)
        cells += ["–" if needed is None else f"{needed:,}", f"{100 * chance:.0f} %"]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def read_spread(path: Path) -> Spread:
    """Return the spread of the primary measure in a `comparison.json` of several seeds.

    Raises:
        UserError: the file is missing, or the comparison has a single seed.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["primary"]
        return Spread(*(float(entry[name]) for name in Spread._fields))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a comparison of several seeds; pipeline.compare writes one") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    lines = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m pipeline.power", description=lines[0])
    parser.add_argument("--difference", type=float, required=True, help="difference to show, in percentage points")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--discordance", type=float, help="percentage of examples that only one of two runs solves")
    source.add_argument("--comparison", type=Path, help="comparison.json of several seeds, whose spread is used")
    parser.add_argument("--seed_sd", type=float, help="SD of the difference between seeds, in points; default: 0")
    parser.add_argument(
        "--correlation", type=float, help="correlation between seeds of the difference on an example; default: 0.5"
    )
    parser.add_argument("--examples", type=int, nargs="+", default=[250, 500, 1000, 2500], help="numbers of examples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 5, 10], help="numbers of seeds")
    parser.add_argument("--power", type=float, default=80.0, help="power for which examples are counted, in percent")
    args = parser.parse_args(arguments)
    if min(args.examples) < 2 or min(args.seeds) < 1:
        raise UserError("--examples: give at least 2, and --seeds at least 1")
    for name in ("seed_sd", "correlation"):
        if args.comparison and getattr(args, name) is not None:
            raise UserError(f"--{name}: has no effect on the spread of --comparison; give --discordance instead of it")
    seed_sd, correlation = args.seed_sd or 0.0, 0.5 if args.correlation is None else args.correlation
    if not 0 <= seed_sd <= 100 or not 0 <= correlation <= 1 or not 0 < args.power < 100:
        raise UserError("--seed_sd: from 0 to 100; --correlation: from 0 to 1; --power: between 0 and 100")
    if not abs(args.difference) <= 100:
        raise UserError("--difference: from -100 to 100 percentage points")
    difference = args.difference / 100
    if args.comparison:
        spread = read_spread(args.comparison)
    else:
        spread = spread_of_discordance(difference, args.discordance / 100, seed_sd / 100, correlation)
    print("\n".join(power_table(difference, spread, args.seeds, args.examples, args.power / 100)))
    if spread.seed_sd and 1 in args.seeds:
        print("\nWith one seed, the test does not cover the seed, so chance makes it significant more often than 5 %.")
    if args.discordance:
        powers = (mcnemar_power(difference, args.discordance / 100, count) for count in args.examples)
        exact = ", ".join(f"{100 * power:.0f} %" for power in powers)
        print(f"\nMcNemar's exact test of one pair of runs: {exact}.")


if __name__ == "__main__":
    exit_cleanly(main)

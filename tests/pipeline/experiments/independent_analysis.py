"""A second analysis of an experiment, from the CSV of its values and its plan file alone.

It shares no code with `pipeline.experiments.analysis`, and uses scipy's paired t-test instead of formulas.

    python tests/pipeline/experiments/independent_analysis.py docs/bench/experiment.csv pipeline/experiments/plan.yaml
"""

import csv
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import yaml
from scipy import stats

MEASURES = ["low_unseen", "low_seen", "low", "mid", "pivot", "confusion"]  # the first is the primary one


def analyze(csv_path: str, plan_path: str) -> list[dict[str, Any]]:
    """Return all comparisons: the primary contrasts of the plan first, then every variant against sft."""
    table: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    with open(csv_path, encoding="utf-8") as file:
        for line in csv.DictReader(file):
            table[line["world"], line["arm"], line["measure"]][int(line["seed"])] = float(line["value"])
    with open(plan_path, encoding="utf-8") as file:
        plan = yaml.safe_load(file)
    first = [(c["world"], c["variant"], c["baseline"], MEASURES[0]) for c in plan.get("primary") or []]
    second = [
        (world, arm, "sft", measure)
        for world in plan["worlds"]
        for arm, variant in plan["arms"].items()
        if arm != "sft" and (variant.get("worlds") is None or world in variant["worlds"])
        for measure in MEASURES
    ]
    second = [test for test in second if test not in first]
    return correct([compare(table, test) for test in first]) + correct([compare(table, test) for test in second])


def compare(table: dict[tuple[str, str, str], dict[int, float]], test: tuple[str, str, str, str]) -> dict[str, Any]:
    """Compare two variants on the seeds that both have."""
    world, arm, baseline, measure = test
    ours, theirs = table[world, arm, measure], table[world, baseline, measure]
    seeds = sorted(set(ours) & set(theirs))
    row: dict[str, Any] = {
        "world": world,
        "variant": arm,
        "baseline": baseline,
        "measure": measure,
        "seeds": len(seeds),
    }
    if len(seeds) > 1:
        result = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        low, high = result.confidence_interval(0.95)
        mean = np.mean([ours[seed] - theirs[seed] for seed in seeds])
        if np.isnan(result.pvalue):  # all differences are 0, to which scipy gives no p-value
            low, high, p_value = mean, mean, 1.0
        else:
            p_value = float(result.pvalue)
        row |= {"mean": float(mean), "low": float(low), "high": float(high), "p": p_value}
    return row


def correct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm's correction to the rows that have a p-value, and leave out the others."""
    rows = [row for row in rows if "p" in row]
    sizes = {id(row): sum(other["p"] >= row["p"] for other in rows) for row in rows}
    for row in rows:
        row["p_holm"] = min(1.0, max(sizes[id(other)] * other["p"] for other in rows if other["p"] <= row["p"]))
    return rows


if __name__ == "__main__":
    for row in analyze(*sys.argv[1:3]):
        print(
            f"{row['world']:>14} {row['variant']:>14} - {row['baseline']:<5} {row['measure']:<11} n={row['seeds']:<3}"
            f"{100 * row['mean']:+6.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}] p={row['p_holm']:.4f}"
        )

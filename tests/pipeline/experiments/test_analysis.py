"""Compare the statistics with scipy, with an independent analysis of the same CSV, and with simulated power."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.experiments.__main__ import PLAN
from pipeline.experiments.analysis import holm, interval, p_value, seeds_needed, values_csv
from pipeline.experiments.plan import read_experiment_plan
from pipeline.experiments.results import write_experiment_results
from tests.pipeline.experiments.independent_analysis import analyze
from tests.pipeline.experiments.planted_results import plant_all

PUBLISHED = PLAN.parents[2] / "docs" / "bench" / "experiment.csv"


def assert_equal_tables(rows: list[dict], expected: list[dict]) -> None:
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, abs=2e-6)), (row, other)


def test_independent_analysis_of_csv_gives_same_table(tmp_path: Path) -> None:
    plan_path = PLAN.parent / "plan.yaml"
    plan, output = read_experiment_plan(plan_path), tmp_path / "out"
    plant_all(plan, output)
    write_experiment_results(plan, output)
    rows = json.loads((output / "results.json").read_text())["comparisons"]
    expected = analyze(str(output / "results.csv"), str(plan_path))
    assert_equal_tables(rows, expected)
    assert sum(row["p_holm"] < 0.05 for row in rows) not in (0, len(rows))

    lines = (output / "results.csv").read_text().splitlines()
    changed = tmp_path / "changed.csv"
    changed.write_text("\n".join(line for line in lines if not line.startswith("100,main,hard,low_unseen")))
    with pytest.raises(AssertionError):
        assert_equal_tables(rows, analyze(str(changed), str(plan_path)))


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the results of plan.yaml are not published yet")
def test_independent_analysis_of_published_csv_gives_published_table() -> None:
    published = json.loads(PUBLISHED.with_suffix(".json").read_text())["comparisons"]
    assert_equal_tables(published, analyze(str(PUBLISHED), str(PLAN.parent / "plan.yaml")))


def test_interval_and_p_value_match_scipy() -> None:
    values = list(np.random.default_rng(0).normal(3, 2, 10))
    expected = stats.t.interval(0.95, 9, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values)[1:] == pytest.approx(expected)
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_p_value_of_constant_or_single_values() -> None:
    assert p_value([0.5, 0.5]) == 0 and p_value([0.0, 0.0]) == 1
    assert math.isnan(p_value([0.5]))


def test_holm_matches_example() -> None:
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx([0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True)


@pytest.mark.parametrize("deviation", [0.05, 0.1])
def test_seeds_needed_gives_requested_power(deviation: float) -> None:
    n = seeds_needed(deviation)
    samples = np.random.default_rng(0).normal(0.05, deviation, (4000, n))
    power = float(np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05))
    assert power == pytest.approx(0.8, abs=0.03)


def test_values_csv_contains_every_number() -> None:
    text = values_csv({("sft", "main"): {7: {"arm": "sft", "world": "main", "seed": 7, "low": 0.25, "copies": {}}}})
    assert text == "seed,world,arm,measure,value\n7,main,sft,low,0.25\n"

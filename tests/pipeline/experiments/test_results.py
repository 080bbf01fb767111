"""Test intervals and tables with planted metrics."""

import json

import numpy as np
import pytest
from scipy import stats

from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.experiments.plan import ExperimentPlan, Variant
from pipeline.experiments.results import (
    FRACTION_HEADINGS,
    REPRESENTATION_HEADINGS,
    interval,
    read_results,
    write_experiment_results,
)

PLAN = ExperimentPlan({"sft": Variant(), "ours": Variant()}, [60], [1, 2, 3], TrainingSettings(), TrainingSettings())


def plant(output, variant, seed, **metrics):
    directory = output / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    values = dict.fromkeys([*FRACTION_HEADINGS, *REPRESENTATION_HEADINGS], 0.5) | metrics
    values |= {"arm": variant, "amount": 60, "seed": seed}
    (directory / f"{variant}-60.json").write_text(json.dumps(values))


def test_interval_matches_scipy():
    values = list(np.random.default_rng(0).normal(3, 2, 10))
    expected = stats.t.interval(0.95, 9, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values)[1:] == pytest.approx(expected)


def test_write_results_pairs_differences_by_seed(tmp_path):
    for seed, low in ((1, 0.40), (2, 0.60), (3, 0.50)):
        plant(tmp_path, "sft", seed, low=low)
    plant(tmp_path, "ours", 1, low=0.50)  # +10 points for each seed, so the interval is empty
    plant(tmp_path, "ours", 3, low=0.60)
    assert "| ours | +10.0 |" in write_experiment_results(PLAN, tmp_path)  # no interval for two seeds
    plant(tmp_path, "ours", 2, low=0.70)
    text = write_experiment_results(PLAN, tmp_path)
    assert "| sft | 50.0 |" in text
    assert "| ours | +10.0 [+10.0, +10.0] |" in text
    summary = json.loads((tmp_path / "results.json").read_text())["amounts"]["60"]["ours"]
    assert summary["seeds"] == [1, 2, 3]
    assert summary["minus_sft"]["low"]["mean"] == pytest.approx(0.1)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_write_results_reports_failed_sanity_check(tmp_path):
    plant(tmp_path, "sft", 1, low=0.95)
    assert "Sanity check failed: the low-resource accuracy of sft is 95.0 %" in write_experiment_results(PLAN, tmp_path)


def test_write_results_refuses_missing_baseline(tmp_path):
    assert read_results(tmp_path) == {}
    with pytest.raises(UserError, match="no results of 'sft'"):
        write_experiment_results(PLAN, tmp_path)

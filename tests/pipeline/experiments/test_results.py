"""Intervals and tables from planted figures."""

import json

import numpy as np
import pytest
from scipy import stats

from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.experiments.plan import Arm, Plan
from pipeline.experiments.results import SHARES, STATES, interval, read_figures, write_results

PLAN = Plan({"sft": Arm(), "ours": Arm()}, [60], [1, 2, 3], TrainingSettings(), TrainingSettings())


def plant(output, arm, seed, **figures):
    directory = output / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    values = dict.fromkeys([*SHARES, *STATES], 0.5) | figures | {"arm": arm, "amount": 60, "seed": seed}
    (directory / f"{arm}-60.json").write_text(json.dumps(values))


def test_interval_is_students(tmp_path):
    values = list(np.random.default_rng(0).normal(3, 2, 10))
    expected = stats.t.interval(0.95, 9, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values)[1:] == pytest.approx(expected)


def test_differences_are_paired_by_seed(tmp_path):
    for seed, base in ((1, 0.40), (2, 0.60), (3, 0.50)):
        plant(tmp_path, "sft", seed, low=base)
    plant(tmp_path, "ours", 1, low=0.50)  # +10 each: no spread, whatever the seeds' own
    plant(tmp_path, "ours", 3, low=0.60)
    assert "| ours | +10.0 |" in write_results(PLAN, tmp_path)  # two seeds bound nothing
    plant(tmp_path, "ours", 2, low=0.70)
    text = write_results(PLAN, tmp_path)
    assert "| sft | 50.0 |" in text
    assert "| ours | +10.0 [+10.0, +10.0] |" in text
    found = json.loads((tmp_path / "results.json").read_text())["amounts"]["60"]["ours"]
    assert found["seeds"] == [1, 2, 3]
    assert found["minus_sft"]["low"]["mean"] == pytest.approx(0.1)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_out_of_its_gate_is_told(tmp_path):
    plant(tmp_path, "sft", 1, low=0.95)
    assert "Gate missed: sft at 95.0 %" in write_results(PLAN, tmp_path)


def test_nothing_to_show_is_one_line(tmp_path):
    assert read_figures(tmp_path) == {}
    with pytest.raises(UserError, match="no results of the arm 'sft'"):
        write_results(PLAN, tmp_path)

"""The predicted power against simulated comparisons and exact tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, norm, ttest_1samp

from pipeline.common.errors import UserError
from pipeline.evaluation.significance import mcnemar
from pipeline.power import Spread, examples_for_power, main, mcnemar_power, simulate_power, spread_of_discordance
from tests.pipeline.evaluation.test_seed_intervals import MEAN, simulate_intervals


def test_mgsm_has_27_percent_power_for_3_8_points() -> None:
    """250 problems at a discordance of 20 %, in one language: simulated answers of two models, and the prediction."""
    outcomes = np.random.default_rng(0).choice([1.0, -1.0, 0.0], p=[0.119, 0.081, 0.8], size=(3000, 250))
    significant = ttest_1samp(outcomes, 0.0, axis=1).pvalue < 0.05  # as `seed_interval` of one seed
    exact = [mcnemar(int((row == 1).sum()), int((row == -1).sum())) < 0.05 for row in outcomes]
    spread = spread_of_discordance(0.038, 0.2, 0.0, 0.5)
    predicted = simulate_power(0.038, spread, 1, 250)
    assert np.mean(significant) == pytest.approx(0.27, abs=0.02) and predicted == pytest.approx(0.27, abs=0.01)
    assert mcnemar_power(0.038, 0.2, 250) == pytest.approx(np.mean(exact), abs=0.02)
    assert binomtest(10, 10).pvalue < 0.05 and mcnemar_power(1.0, 1.0, 10) == pytest.approx(1.0)
    closed_form = (norm.ppf(0.975) + norm.ppf(0.8)) ** 2 * (0.2 - 0.038**2) / 0.038**2
    assert examples_for_power(0.038, spread, 1, 0.8) == pytest.approx(closed_form, rel=0.03)  # about 1,080


def test_power_of_several_seeds_equals_simulated_comparisons() -> None:
    means, half = simulate_intervals(np.random.default_rng(1), 1500, 4, 400, 0.01, 0.3)
    spread = spread_of_discordance(MEAN, 0.2, 0.01, 0.3)
    assert simulate_power(MEAN, spread, 4, 400) == pytest.approx(np.mean(np.abs(means) > half), abs=0.04)


def test_more_examples_do_not_replace_seeds() -> None:
    spread = Spread(0.02, 0.3, 0.3)
    assert examples_for_power(0.03, spread, 3, 0.8) is None
    assert examples_for_power(0.03, spread, 8, 0.8) is not None
    assert simulate_power(0.0, spread, 3, 1000) < 0.06 < simulate_power(0.0, spread, 1, 1000)


def test_command_reads_spread_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"primary": {"seed_sd": 0.0, "example_sd": 0.0, "rest_sd": 0.3}}))
    main(["--difference", "4", "--comparison", str(path), "--seeds", "1", "5", "--examples", "300"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| seeds | 300 examples | examples for 80 % |") and len(rows) == 4
    path.write_text(json.dumps({"primary": {"difference": 0.1}}))
    with pytest.raises(UserError, match="not a comparison of several seeds"):
        main(["--difference", "4", "--comparison", str(path)])
    with pytest.raises(UserError, match="--discordance: must be at least the difference"):
        main(["--difference", "4", "--discordance", "3"])
    path.write_text(json.dumps({"primary": {"seed_sd": 0.0, "example_sd": 0.3, "rest_sd": 0.3}}))
    for option in ("--seed_sd", "--correlation"):
        with pytest.raises(UserError, match=f"{option}: has no effect on the spread of --comparison"):
            main(["--difference", "4", "--comparison", str(path), option, "0"])
    for difference in ("nan", "400"):
        with pytest.raises(UserError, match="--difference: from -100 to 100 percentage points"):
            main(["--difference", difference, "--comparison", str(path)])


@pytest.mark.parametrize("seed_sd", ["nan", "inf", "-1"])
def test_command_refuses_a_spread_that_is_no_number(seed_sd: str) -> None:
    with pytest.raises(UserError, match="--seed_sd: from 0 to 100"):
        main(["--difference", "4", "--discordance", "20", "--seed_sd", seed_sd])

"""Test tables and screening with planted metrics."""

import json

import pytest
import yaml

from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.experiments.analysis import read_results
from pipeline.experiments.plan import Contrast, ExperimentPlan, Variant, World, resolve_plan
from pipeline.experiments.results import write_experiment_results
from pipeline.experiments.screening import read_chosen
from pipeline.loss import LossSettings
from tests.pipeline.experiments.planted_results import plant


def make_plan(**variants: Variant) -> ExperimentPlan:
    arms = {"sft": Variant(), **variants}
    return ExperimentPlan(arms, {"main": World()}, [1, 2, 3], TrainingSettings(), TrainingSettings())


PLAN = make_plan(ours=Variant())


def test_write_results_pairs_differences_by_seed(tmp_path):
    for seed, low in ((1, 0.40), (2, 0.60), (3, 0.50)):
        plant(tmp_path, "sft", seed, low_unseen=low, low_seen=1.0)
    plant(tmp_path, "ours", 1, low_unseen=0.50)  # +10 points for each seed, so the interval is empty
    plant(tmp_path, "ours", 3, low_unseen=0.60)
    assert "| ours | 2 | +10.0 |" in write_experiment_results(PLAN, tmp_path).replace(
        "*", ""
    )  # no interval for two seeds
    plant(tmp_path, "ours", 2, low_unseen=0.70, gradient_share=0.25)
    plant(tmp_path, "sft", 4, low_unseen=0.50, low_seen=1.0, final_cosine=0.9)  # a seed that `ours` lacks
    text = write_experiment_results(PLAN, tmp_path)
    assert "| sft | 4 | 50.0 |" in text and "Sanity check" not in text
    assert "| ours | 3 | +10.0 [+10.0, +10.0]* |" in text
    assert "means over the 3 seeds that all variants have" in text and "0.60" not in text
    assert text.splitlines()[-1].endswith("| 0.25 |")
    row = json.loads((tmp_path / "results.json").read_text())["comparisons"][0]
    assert row["seeds"] == 3 and row["mean"] == pytest.approx(0.1) and not row["primary"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_write_results_lists_primary_contrasts_first(tmp_path):
    for seed in (1, 2, 3):
        plant(tmp_path, "sft", seed)
        plant(tmp_path, "ours", seed, low_unseen=0.5 + 0.01 * seed)
    plan = make_plan(ours=Variant())
    plan.primary.append(Contrast("ours", "sft", "main"))
    text = write_experiment_results(plan, tmp_path)
    assert text.startswith("Primary: held-out combinations")
    assert "| ours - sft | main | 3 | +2.0 [-0.5, +4.5] | 3.1 | 0.0742 |" in text
    for seed in (1, 2, 3):
        plant(tmp_path, "ours", seed, low_unseen=0.6)
    text = write_experiment_results(plan, tmp_path)
    assert "| ours - sft | main | 3 | +10.0 [+10.0, +10.0] | 0.0 | < 0.0001 |" in text


def test_write_results_reports_failed_sanity_check(tmp_path):
    plant(tmp_path, "sft", 1, low_seen=0.94)
    plant(tmp_path, "sft", 2, low_seen=0.96)
    text = write_experiment_results(PLAN, tmp_path)
    assert "Sanity check failed: sft has not learned the seen combinations (95%) with 1 of 2 seeds: 1." in text


def test_write_results_refuses_missing_baseline(tmp_path):
    assert read_results(tmp_path) == {}
    with pytest.raises(UserError, match="no results of 'sft'"):
        write_experiment_results(PLAN, tmp_path)


def test_screening_chooses_best_trial_without_foreign_words(tmp_path):
    loss = LossSettings(alignment_weight=10, top_k=None, detach=("pivot", "probabilities"))
    trials = {
        "a_best": Variant(family="a", loss=loss, idf=True),
        "a_mixed": Variant(family="a", dictionary=1.0),
        "a_worse": Variant(family="a", hard=1.0),
        "b_mixed": Variant(family="b", hard=2.0),
        "b_less_mixed": Variant(family="b", hard=3.0),
    }
    values = {"a_best": (0.2, 0.004), "a_mixed": (0.3, 0.006), "a_worse": (0.1, 0.0), "b_mixed": (0.3, 0.5)}
    values |= {"b_less_mixed": (0.0, 0.4), "sft": (0.0, 0.0)}
    for seed in (1, 2, 3):
        for name, (gain, foreign_words) in values.items():
            noise = 0.05 * (seed - 2) if name == "a_best" else 0
            plant(tmp_path, name, seed, low_unseen=0.1 + gain + noise, confusion=foreign_words)
    text = write_experiment_results(make_plan(**trials), tmp_path)
    assert "| a | a_best | +20.0 | 5.0 | +0.4 | chosen |" in text
    assert text.count("chosen") == 2 and "| b | b_less_mixed | +0.0 | 0.0 | +40.0 | chosen |" in text
    chosen = read_chosen(tmp_path / "chosen.yaml")
    assert chosen.seeds == 10  # (2.26 + 0.88)^2 with a standard deviation of 5 points
    assert chosen.families == {"a": Variant(loss=loss, idf=True), "b": Variant(hard=3.0)}

    final = make_plan(ours=Variant(family="a"), control=Variant(family="a", shuffle=True, worlds=["main"]))
    resolved = resolve_plan(final, 2, chosen.families)
    assert resolved.seeds == [1, 2] and resolved.arms["ours"].loss == loss and resolved.arms["ours"].idf
    assert resolved.arms["control"].shuffle and resolved.arms["control"].worlds == ["main"]
    with pytest.raises(UserError, match="has not chosen a trial of the family 'c'"):
        resolve_plan(make_plan(ours=Variant(family="c")), 2, chosen.families)


def test_read_chosen_refuses_missing_and_invalid_file(tmp_path):
    with pytest.raises(UserError, match="run the screening"):
        read_chosen(tmp_path / "chosen.yaml")
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump({"seeds": 3, "families": {"a": {"los": {}}}}))
    with pytest.raises(UserError, match="invalid outcome of a screening"):
        read_chosen(tmp_path / "chosen.yaml")

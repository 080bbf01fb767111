"""The choice of the best checkpoint, early stopping, and mistakes in the settings of validation.

Runs that validate are in test_loop.py, test_resume_checks.py, test_export.py and test_reshard.py.
"""

import json
import math
from pathlib import Path

import pytest

from data_prep.shards.format import MANIFEST
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import LOSS_FAILURE
from pipeline.config.recipe import load_config
from pipeline.training import best_metric
from pipeline.training.loop import is_finished
from pipeline.training.preflight import prepare_run
from pipeline.training.state import TrainState, ValidationState
from pipeline.training.validation import is_due
from tests.conftest import Prepared
from tests.runs import select_rows, train, validations, write_recipe


@pytest.mark.parametrize(("greater", "improved"), [(False, [1, 0, 0, 1, 0]), (True, [1, 1, 0, 0, 0])])
def test_validation_state_counts_since_best(greater: bool, improved: list[int]) -> None:
    state = ValidationState()
    counts = []
    for step, value in enumerate([2.0, 3.0, math.nan, 1.0, 1.0], start=1):
        assert state.update(step, value, greater) == bool(improved[step - 1])
        counts.append(state.without_improvement)
    assert (state.best_step, state.best_metric) == ((2, 3.0) if greater else (4, 1.0))
    assert counts == ([0, 0, 1, 2, 3] if greater else [0, 1, 2, 0, 1])


def test_validation_state_without_finite_value() -> None:
    state = ValidationState()
    assert not state.update(1, math.nan, False) and not state.update(2, math.nan, True)
    assert (state.best_step, state.best_metric, state.without_improvement) == (None, None, 2)


def test_best_metric_restarts_if_criterion_changes(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, data__eval_shards="unused")
    manifest = json.loads((prepared.shards / MANIFEST).read_text())

    def criterion(*overrides: str) -> dict:
        return best_metric.criterion(load_config(recipe, list(overrides)), manifest)

    metric = ["--training.metric_for_best_model", "eval_loss"]
    before = criterion(*metric)
    state = {"criterion": before, "step": 9, "best_step": 6, "best_metric": 2.5, "without_improvement": 1}
    for unchanged in ([], ["--training.greater_is_better", "false"], ["--training.early_stopping_patience", "3"]):
        assert best_metric.resume(criterion(*metric, *unchanged), state) == ValidationState(**state)
    assert capsys.readouterr().out == ""
    for changed in (["--loss.alignment_weight", "2"], ["--training.greater_is_better", "true"], [metric[0], "eval_ce"]):
        assert best_metric.resume(criterion(*metric, *changed), state).best_step is None
        assert "the best checkpoint by eval_loss, step 6, is not kept" in capsys.readouterr().out
    manifest["shards"].pop()
    assert best_metric.resume(criterion(*metric), state).step == 0


def test_greater_is_better_only_for_cosine(prepared: Prepared, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, data__eval_shards="unused")
    for metric, expected in {"eval_ce": False, "eval_loss": False, "eval_align_cos": True}.items():
        config = load_config(recipe, ["--training.metric_for_best_model", metric])
        assert best_metric.greater_is_better(config.training) == expected


def test_run_stays_finished_after_early_stopping(prepared: Prepared, tmp_path: Path) -> None:
    """The state is that of a checkpoint from which a finished run resumes."""
    shards = select_rows(prepared.shards, tmp_path / "eval", slice(3))
    settings = {"data__eval_shards": str(shards), "training__eval_steps": 2, "training__max_steps": 5}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings)
    state = TrainState(step=4, validation=ValidationState(step=4, without_improvement=2))
    patience = ["--training.metric_for_best_model", "eval_ce", "--training.early_stopping_patience"]
    for overrides, finished in (([], False), ([*patience, "3"], False), ([*patience, "2"], True)):
        assert is_finished(prepare_run(load_config(recipe, overrides), 0, 1), state) == finished
    run = prepare_run(load_config(recipe, []), 0, 1)
    due = [step for step in range(6) if is_due(run, TrainState(step=step))]
    assert due == [2, 4, 5] and not is_due(run, state)


def test_run_with_spoiled_weights_does_not_stop_early_as_finished(prepared: Prepared, tmp_path: Path) -> None:
    """The loss and gradients of the first step are finite, but not the weights after it."""
    shards = select_rows(prepared.shards, tmp_path / "eval", slice(2))
    settings = {"data__eval_shards": str(shards), "training__eval_steps": 1, "training__save_steps": 1}
    settings |= {"training__metric_for_best_model": "eval_loss", "training__early_stopping_patience": 1}
    settings |= {"training__learning_rate": 1e30, "training__warmup_ratio": 0.0, "training__export_at_end": True}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings)
    output = train(1, "--config", recipe, expect=LOSS_FAILURE)
    assert output.count("error: step 1: the cross entropy on data.eval_shards is not finite") == 1
    run = tmp_path / "run"
    assert math.isnan(validations(run)[0]["eval_ce"])
    assert not list(run.glob("checkpoint-*")) and not (run / "hf").exists()


def test_validation_refuses_other_data_and_unknown_metric(prepared: Prepared, tmp_path: Path) -> None:
    shards = select_rows(prepared.shards, tmp_path / "eval", slice(3))
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, data__eval_shards=str(shards))

    def refusal(metric: str = "eval_ce_sw", **changes: object) -> str:
        manifest = json.loads((prepared.shards / MANIFEST).read_text())
        selected = json.loads((shards / MANIFEST).read_text())["shards"]
        write_json(shards / MANIFEST, manifest | {"shards": selected} | changes)
        with pytest.raises(UserError) as caught:
            prepare_run(load_config(recipe, ["--training.metric_for_best_model", metric]), 0, 1)
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
        return str(caught.value)

    tokenizer = {"fingerprint": "other"}
    assert f"{shards}: packed with another tokenizer than" in refusal(tokenizer=tokenizer)
    assert f"{shards}: packed with another pivot language" in refusal(pivot="de")
    assert "has languages that" in (message := refusal(languages=["en", "xx"])) and "lacks: xx" in message
    message = refusal("eval_accuracy")
    assert f"no metric 'eval_accuracy' on {shards}; choose one of eval_loss, eval_ce, eval_alignment" in message
    assert "no metric 'eval_ce_sw'" in refusal(languages=["de", "en"])
    without_pairs = refusal("eval_alignment", totals={"pairs": 0})
    assert "no metric 'eval_alignment'" in without_pairs and "eval_align_cos" not in without_pairs

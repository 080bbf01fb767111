"""A resumed run is compared with its checkpoint: changes are refused, or recorded and effective."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipeline.checkpoint import layout
from pipeline.common.errors import UserError
from pipeline.config.changes import VALUES_BEFORE, changed_settings, saved_config
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.export import export
from pipeline.fault_tolerance.restarts import read_restart_log
from pipeline.loss import LossSettings
from pipeline.status import status
from pipeline.training.preflight import prepare_run
from pipeline.training.resume_checks import ResumePoint, find_resume_point
from tests.conftest import Prepared
from tests.pipeline.training.dense_validation import assert_matches_dense, dense_validation
from tests.runs import TINY, metrics, select_rows, train, validations, write_recipe


def test_changed_settings_of_older_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that the checkpoint lacks has the value of the code before it, even if the default is another."""
    recipe = "seed: 42\nloss: {detach: [pivot], removed_key: 1}\ntraining: {learning_rate: 2.0e-5}\n"
    assert [str(change) for change in changed_settings(saved_config(recipe), Config())] == [
        "loss.top_k null -> 20",
        "training.learning_rate 2e-05 -> 1e-05",
        "training.export_at_end false -> true",
    ]
    aligned = replace(Config(), loss=LossSettings(pooling_tokens="hidden_states", layer=3))
    changes = {change.key: change.rule for change in changed_settings(saved_config(recipe), aligned)}
    assert changes["loss.pooling_tokens"] is None and changes["loss.layer"] is None  # a resumed run keeps them
    monkeypatch.setitem(VALUES_BEFORE, "loss.distance", "mse")
    change, *_ = changed_settings(saved_config(recipe), Config())
    assert (str(change), change.rule) == ('loss.distance "mse" -> "cosine"', None)


def resume_point(recipe: Path, *overrides: object) -> ResumePoint:
    point = find_resume_point(prepare_run(load_config(recipe, list(map(str, overrides))), 0, 1))
    assert point is not None
    return point


@pytest.mark.slow
def test_resume_refuses_or_records_changes(prepared: Prepared, tmp_path: Path) -> None:
    """Share one run of three steps among all checks, because training takes much longer than they do."""
    changes = {"training__max_steps": 3, "training__train_micro_batch_size_per_gpu": 2, "loss__centring": True}
    changes["training__embedding_learning_rate"] = 0.002
    changes["data__eval_shards"] = str(select_rows(prepared.shards, tmp_path / "eval", slice(5)))
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(1, "--config", recipe)
    (validation,) = validations(tmp_path / "run")  # of the last step
    export(tmp_path / "run", tmp_path / "hf")
    expected = dense_validation(tmp_path / "hf", recipe, tmp_path / "run" / "checkpoint-3")
    assert_matches_dense(validation, expected)
    _check_harmless_changes(recipe, prepared)
    _check_refused_changes(recipe, prepared)
    _check_refused_by_deepspeed(recipe)

    stopping = {"eval_steps": 1, "metric_for_best_model": "eval_ce", "greater_is_better": True}
    stopping |= {"early_stopping_patience": 2, "save_steps": 5}
    extended = ["--training.max_steps", 8, "--training.learning_rate", 0.001, "--training.weight_decay", 0.5]
    extended += [word for key, value in stopping.items() for word in (f"--training.{key}", value)]
    extended += ["--training.embedding_learning_rate", 0.004, "--loss.alignment_weight", 0.5]
    output = train(1, "--config", recipe, *extended)
    _check_recorded_changes(tmp_path / "run", output, stopping)
    _check_early_stopping(tmp_path / "run", output)
    # DeepSpeed loads the weight decay of the checkpoint, but the optimizer has used the new one.
    (path,) = (tmp_path / "run" / "checkpoint-5" / "zero").glob("*optim_states.pt")
    saved = torch.load(path, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
    assert {group["weight_decay"] for group in saved["param_groups"]} == {0.0, 0.5}
    _check_unreadable_metadata(recipe, extended)


def _check_harmless_changes(recipe: Path, prepared: Prepared) -> None:
    """Resume with the same settings, with moved shards, and with another padding to the same size."""
    unchanged = resume_point(recipe)
    assert (unchanged.notes(), unchanged.record()) == ([], {})
    moved = recipe.parent / "moved"
    shutil.copytree(prepared.shards, moved)
    assert resume_point(recipe, "--data.shards", moved).jumps == []
    same_size = resume_point(recipe, "--model.vocab_multiple", 8)  # 600 is a multiple of 24 and of 8
    assert [str(change) for change in same_size.changes] == ["model.vocab_multiple 24 -> 8"]


def _check_refused_changes(recipe: Path, prepared: Prepared) -> None:
    weights = recipe.parent / "weights.safetensors"
    save_file({"weights": torch.ones(600)}, weights)
    fewer = select_rows(prepared.shards, recipe.parent / "other", slice(-1))
    wider = {**TINY, "rope_theta": 500000.0}
    for overrides, message in {
        ("--seed", 4): "cannot resume with other settings: seed 3 -> 4; restore them or use another output_dir",
        ("--training.train_batch_size", 8): "training.train_batch_size 4 -> 8",
        ("--training.precision", "bf16"): 'training.precision "fp32" -> "bf16"',
        ("--loss.distance", "mse"): 'loss.distance "cosine" -> "mse"',
        ("--data.language_weights.sw", 2): "data.language_weights {} -> ",
        ("--data.shards", fewer): "different content of data.shards",
        ("--loss.vocabulary_weights", weights): "different content of loss.vocabulary_weights",
        ("--model.config", json.dumps(wider)): "checkpoint of a different model (rope_",
        ("--model.vocab_multiple", 64): "padded to 640); restore model.vocab_multiple if only the padding differs",
        ("--training.max_steps", 2): "is past the last step of this run (2); raise training.max_steps",
    }.items():
        with pytest.raises(UserError) as caught:
            resume_point(recipe, *overrides)
        assert message in str(caught.value) and "use another output_dir" in str(caught.value)


def _check_refused_by_deepspeed(recipe: Path) -> None:
    """Refuse files that DeepSpeed refuses when it builds the engine, or with which it cannot load the checkpoint."""
    file = recipe.parent / "ds.json"
    for content, message in [
        ({"prescale_gradients": True}, f"{file}: DeepSpeed refuses it (pre-scale gradients"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 500}}, "saved with another zero_optimization.sub_group"),
    ]:
        file.write_text(json.dumps({"zero_optimization": {"stage": 3}} | content))
        output = train(1, "--config", recipe, "--deepspeed", file, expect=2)
        assert message in output and "Traceback" not in output


def _check_recorded_changes(run: Path, output: str, stopping: dict[str, object]) -> None:
    """Check the start record, the notes and the saved recipe of a run resumed after step 3 with other settings."""
    start = [event for event in read_restart_log(run) if event["event"] == "start"][-1]
    assert start["changed"] == {
        "training.max_steps": [3, 8],
        "training.learning_rate": [0.003, 0.001],
        "training.embedding_learning_rate": [0.002, 0.004],
        "training.weight_decay": [0.1, 0.5],
        "training.save_steps": [100, 5],
        "loss.alignment_weight": [1.0, 0.5],
        **{f"training.{key}": [None, value] for key, value in stopping.items() if key != "save_steps"},
    }
    assert "note: settings changed since" in output and "training.max_steps 3 -> 8" in output
    records = metrics(run)
    for key, name in {
        "learning_rate": "learning rate",
        "embedding_learning_rate": "learning rate of the input embedding",
        "align_weight": "alignment weight",
    }.items():
        before, after = start[key]
        assert (before, after) == (records[2][key], records[3][key])
        assert f"note: the {name} changes from {before:.3g} (step 3) to {after:.3g} (next step)" in output
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["learning_rate"] == 0.001


def _check_early_stopping(run: Path, output: str) -> None:
    # The new metric is measured on the checkpoint first. The cross entropy falls, so a greater one is never seen again.
    steps = [(record["step"], record["best_step"]) for record in validations(run)[-3:]]
    assert steps == [(3, 3), (4, 3), (5, 3)]
    # The checkpoint had been saved before this validation, and now has its result.
    assert layout.read_state(run / "checkpoint-3")["validation"]["best_step"] == 3
    assert "stopped early after step 5: eval_ce has not improved for 2 validations; best: " in output
    assert "done, stopped early" in status(run)[0]


def _check_unreadable_metadata(recipe: Path, overrides: list) -> None:
    """Damage files of the newest checkpoint without changing their size."""
    run = recipe.with_suffix("")
    for name in ("config.yaml", "model_config/config.json"):
        file = run / "checkpoint-5" / name
        content = file.read_bytes()
        file.write_bytes(b"[" * len(content))
        message = rf"{name.partition('/')[0]}: unreadable \(.*\); remove .*checkpoint-5"
        with pytest.raises(UserError, match=message) as caught:
            resume_point(recipe, *overrides)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=message):
            export(run, recipe.parent / "hf")
        file.write_bytes(content)

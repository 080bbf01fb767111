"""A run resumes on another number of ranks with the same rows in the same order and the same losses."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import read_state, universal_path
from pipeline.checkpoint.reshard import convert_to_universal
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import USER_ERROR
from tests.conftest import Prepared
from tests.runs import ROOT, metrics, select_rows, train, validations, write_recipe

SETTINGS = {
    "training__train_batch_size": 12,
    "training__max_steps": 5,
    "training__save_steps": 1,
    "training__save_total_limit": 10,
    "training__embedding_learning_rate": 0.0005,
}
# The cross entropy falls, so the validation of step 1 stays the best. On 3 and 4 ranks some have no rows.
VALIDATION = {
    "training__eval_steps": 1,
    "training__metric_for_best_model": "eval_ce",
    "training__greater_is_better": True,
    "training__early_stopping_patience": 9,
}


def keep_up_to(directory: Path, step: int) -> None:
    """Delete later checkpoints, as if the run had been killed after saving checkpoint-`step`."""
    for path in directory.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


def comparable_metrics(directory: Path) -> list[dict[str, float]]:
    """Metrics that do not depend on time or on the number of ranks."""
    dropped = ("tokens_per_second", "mfu", "peak_memory_gb", "save_seconds", "step_seconds")
    records = zip(metrics(directory), validations(directory), strict=True)
    return [{k: v for k, v in (a | b).items() if k not in (*dropped, "eval_seconds")} for a, b in records]


def assert_same(directory: Path, uninterrupted: Path) -> None:
    actual, expected = comparable_metrics(directory), comparable_metrics(uninterrupted)
    assert len(actual) == len(expected) == SETTINGS["training__max_steps"]
    for record, reference in zip(actual, expected, strict=True):
        assert record["num_tokens"] == reference["num_tokens"]
        for key in reference:
            bound = 1e-6 if key in ("loss", "eval_loss") or key.startswith(("ce_loss", "eval_ce")) else 1e-4
            # align_loss is 1 - cosine, so near 0 it has the rounding error of the 1.
            assert record[key] == pytest.approx(reference[key], rel=bound, abs=1e-7), (record["step"], key)


@pytest.fixture(scope="module")
def uninterrupted(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "whole.yaml"
    select_rows(prepared.shards, path.parent / "eval", slice(2))
    changes = {**SETTINGS, **VALIDATION, "data__eval_shards": str(path.parent / "eval")}
    recipe = write_recipe(path, prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", recipe)
    return recipe.with_suffix("")


@pytest.mark.slow
def test_resume_on_other_numbers_of_ranks(prepared: Prepared, uninterrupted: Path, tmp_path: Path) -> None:
    """Train one run on 2, 1, 4 and 3 ranks in turn.

    The start on one rank offloads its optimizer to CPU memory. On 4 ranks, two share each row, and form a node of hpZ
    that divides the vocabulary between them.
    """
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    ds["zero_optimization"] |= {"zero_hpz_partition_size": 2}
    (tmp_path / "hpz.json").write_text(json.dumps(ds))
    changes = {**SETTINGS, **VALIDATION, "data__eval_shards": str(uninterrupted.parent / "eval")}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes)
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for saved_ranks, ranks, step, extra in [
        (2, 1, 1, ["--deepspeed", "ds_configs/zero3_offload.json"]),
        (1, 4, 2, ["--training.sequence_parallel_size", 2, "--deepspeed", tmp_path / "hpz.json"]),
        (4, 3, 3, []),
    ]:
        keep_up_to(run, step)
        output = train(ranks, "--config", recipe, *extra)
        assert f"resumed from {run}/checkpoint-{step}, saved by {saved_ranks} ranks" in output
        assert_same(run, uninterrupted)
        validation = read_state(run / "checkpoint-5")["validation"]
        assert (validation["step"], validation["best_step"], validation["without_improvement"]) == (5, 1, 4)
        assert (run / f".checkpoint-{step}.universal").is_dir()
        assert not list(run.glob(".*.partial"))


@pytest.mark.slow
def test_resume_bf16_keeps_fp32_weights(prepared: Prepared, tmp_path: Path) -> None:
    """Gradients are summed over ranks in bf16, so later losses agree only within its rounding error.

    The linear layers are the same on one rank as on two. By default they round differently.
    """
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    ds["zero_optimization"]["memory_efficient_linear"] = True
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    changes = {**SETTINGS, "training__max_steps": 4, "training__precision": "bf16", "loss__centring": True}
    changes["deepspeed"] = str(tmp_path / "ds.json")
    whole = write_recipe(tmp_path / "whole.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", whole)
    before = metrics(tmp_path / "whole")
    keep_up_to(tmp_path / "whole", 2)
    train(1, "--config", whole)
    after = metrics(tmp_path / "whole")
    assert after[2]["ce_loss"] == pytest.approx(before[2]["ce_loss"], rel=1e-6)  # the same weights
    assert after[3]["ce_loss"] == pytest.approx(before[3]["ce_loss"], rel=1e-3)
    _check_truncated_copy_is_replaced(tmp_path / "whole" / "checkpoint-2")


def _check_truncated_copy_is_replaced(checkpoint: Path) -> None:
    copy = universal_path(checkpoint.parent, checkpoint)
    file = max(copy.rglob("*.pt"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, 100)
    convert_to_universal(checkpoint, checkpoint.parent)
    assert file.stat().st_size == size
    os.utime(file, (1, 1))
    convert_to_universal(checkpoint, checkpoint.parent)  # an intact copy is not replaced
    assert file.stat().st_mtime == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [("touch .checkpoint-2.universal", "Not a directory"), ('mkdir "$6/../COMPLETE.tmp"', "Is a directory")],
    ids=["rename", "COMPLETE"],
)
def test_conversion_that_cannot_be_finished(
    command: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter succeeds, but the rename of its result or the write of COMPLETE fails."""
    converter = tmp_path / "converter"
    converter.write_text(f'#!/bin/sh\nmkdir -p "$6" && cd {tmp_path} && {command}\n')  # $6 is the output folder
    converter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(converter))
    with pytest.raises(UserError) as caught:
        convert_to_universal(tmp_path / "checkpoint-2", tmp_path)
    expected = f"cannot write {tmp_path}/.checkpoint-2.universal: {reason}; fix the cause and restart"
    assert (str(caught.value), caught.value.status) == (expected, USER_ERROR)
    assert not list(tmp_path.glob(".*.partial"))

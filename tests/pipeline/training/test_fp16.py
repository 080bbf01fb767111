"""Runs in fp16: the loss scale when gradients are not finite, and when a run resumes."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.exit_codes import LOSS_FAILURE
from pipeline.config.recipe import load_config
from pipeline.training.preflight import prepare_run
from tests.conftest import Prepared
from tests.runs import metrics, start_ranks, write_recipe

pytestmark = pytest.mark.slow


def train_fp16(ranks: int, kind: str, recipe: Path, expect: int) -> str:
    """Train in fp16 on CPU ranks; returns what all of them wrote."""
    processes = start_ranks(ranks, kind, "--config", recipe, script="tests/pipeline/training/fp16_ranks.py")
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [expect] * ranks, "\n".join(outputs)[-6000:]
    return "\n".join(outputs)


def fp16_recipe(prepared: Prepared, path: Path, scaling: dict[str, Any], **changes: Any) -> Path:
    """Write a recipe in fp16 with these settings of the loss scale."""
    ds = {"fp16": {"enabled": "auto", **scaling}, "zero_optimization": {"stage": 3}}
    path.with_suffix(".json").write_text(json.dumps(ds))
    settings = {"deepspeed": str(path.with_suffix(".json")), "training__precision": "fp16", **changes}
    return write_recipe(path, prepared.shards, prepared.tokenizer, **settings)


def test_fp16_stops_at_the_minimum_loss_scale(prepared: Prepared, tmp_path: Path) -> None:
    """NaN gradients lower the loss scale from 2 to 1 in the first step, and cannot lower it in the second."""
    recipe = fp16_recipe(prepared, tmp_path / "run.yaml", {"initial_scale_power": 1, "hysteresis": 1})
    output = train_fp16(2, "gradients", recipe, LOSS_FAILURE)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in output, output
    for part in ("step 2: the gradient norm is not finite", "rank 1 on ", ", pair ids "):
        assert part in lines[0]


def test_fp16_stops_if_a_static_loss_scale_is_too_large(prepared: Prepared, tmp_path: Path) -> None:
    """No update would be made with it, and it is not lowered."""
    recipe = fp16_recipe(prepared, tmp_path / "run.yaml", {"loss_scale": 2.0**32})
    output = train_fp16(2, "plain", recipe, LOSS_FAILURE)
    assert "step 1: the gradient norm is not finite" in output and "Traceback" not in output, output
    assert "With a loss scale of 1 in place of 4.29497e+09, its gradients are finite" in output


def test_fp16_names_the_records_of_a_nonfinite_loss(prepared: Prepared, tmp_path: Path) -> None:
    """With this loss scale, the gradients of all records overflow, but the loss of one micro-batch is NaN."""
    recipe = fp16_recipe(prepared, tmp_path / "run.yaml", {"initial_scale_power": 32})
    run = prepare_run(load_config(recipe, ["--training.precision", "bf16"]), 1, 2)
    output = train_fp16(2, "states", recipe, LOSS_FAILURE)
    pair_ids = ", ".join(run.loader.next()[1].pair_ids)
    assert "step 1: the loss is not finite" in output and f"the update. rank 1 on {socket.gethostname()}" in output
    assert f"pair ids {pair_ids}. Lower the learning rate" in output


def test_fp16_resumes_before_the_first_update(prepared: Prepared, tmp_path: Path) -> None:
    """The first two updates overflow and are skipped. The run resumes on another number of ranks."""
    scaling = {"initial_scale_power": 32, "hysteresis": 1}
    recipe = fp16_recipe(prepared, tmp_path / "run.yaml", scaling, training__max_steps=2)
    train_fp16(2, "plain", recipe, 0)
    fp16_recipe(prepared, recipe, scaling, training__max_steps=20)
    assert f"resumed from {tmp_path / 'run'}/checkpoint-2, saved by 2 ranks" in train_fp16(1, "plain", recipe, 0)
    records = metrics(tmp_path / "run")
    updated = [record["step"] for record in records if record["grad_norm"] is not None]
    assert 2 < updated[0] < 16 and updated == list(range(updated[0], 21)), updated
    assert records[-1]["loss"] < records[0]["loss"] - 0.2


def test_fp16_resumes_with_other_settings_of_the_loss_scale(prepared: Prepared, tmp_path: Path) -> None:
    """A static scale replaces the dynamic one of the checkpoint, with which all updates overflow."""
    recipe = fp16_recipe(prepared, tmp_path / "run.yaml", {"initial_scale_power": 32}, training__max_steps=2)
    train_fp16(2, "plain", recipe, 0)
    fp16_recipe(prepared, recipe, {"loss_scale": 64}, training__max_steps=4)
    train_fp16(2, "plain", recipe, 0)
    assert [record["grad_norm"] is None for record in metrics(tmp_path / "run")] == [True, True, False, False]

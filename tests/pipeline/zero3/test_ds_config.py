"""DeepSpeed files that are refused, each in one line that says what to change."""

import json
from pathlib import Path

import pytest
from deepspeed.utils.config import get_timers_config

from pipeline.common.errors import UserError
from pipeline.config.recipe import load_config
from pipeline.zero3.ds_config import deepspeed_config
from tests.runs import write_recipe


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimization": {"stage": 2}}, ["stage is 2", "stage 3"]),
        ({"train_batch_size": 8, "zero_optimization": {"stage": 3}}, ["'train_batch_size'", "recipe"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, ["hpz_partition_size is 8", "2 ranks"]),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["mics_shard_size", "remove it"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme"]),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, ["bf16", "training.precision"]),
    ],
    ids=["stage", "batch size", "hpZ", "MiCS", "nvme", "precision"],
)
def test_deepspeed_config_refuses(content: dict, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(file))
    with pytest.raises(UserError) as caught:
        deepspeed_config(load_config(recipe, []), 2)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_deepspeed_config_default_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path), [])
    expected = deepspeed_config(config, 2)
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(config, 2) == expected
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{}")  # a file in the working directory has precedence
    with pytest.raises(UserError, match="stage is None"):
        deepspeed_config(config, 2)


def test_deepspeed_config_accepts_hpz(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(file))
    ds = deepspeed_config(load_config(recipe, []), 4)
    assert ds["zero_optimization"]["zero_hpz_partition_size"] == 2


@pytest.mark.parametrize("configured", [{}, {"timers": {"throughput": {"enabled": True}}}], ids=["default", "set"])
def test_deepspeed_config_disables_throughput_timer(configured: dict, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}} | configured))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(file))
    ds = deepspeed_config(load_config(recipe, []), 2)
    assert get_timers_config(ds).enabled == bool(configured)

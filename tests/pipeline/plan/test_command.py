"""The command line of the planner."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoConfig

from pipeline.benchmarks.scale import published_models
from pipeline.common.errors import UserError
from pipeline.plan.__main__ import parse
from pipeline.plan.command import make_suggestion, predict, recipe_tree, show_suggestion
from pipeline.plan.prediction import GIB
from tests.conftest import Prepared
from tests.pipeline.plan.cases import MODELS
from tests.runs import ROOT, python, refuses, write_recipe

NO_SHARDS = ["--max_seq_length", "4096", "--rows", "1000"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    tree = {
        "model": {"config": MODELS["Qwen2.5-7B"]},
        "data": {"shards": str(tmp_path / "none"), "tokenizer": "none"},
        "deepspeed": "ds_configs/zero3_bf16.json",
        "training": {"train_batch_size": 64},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def test_suggested_recipe_gives_suggested_prediction(recipe: Path, tmp_path: Path) -> None:
    own = json.loads((ROOT / "ds_configs" / "zero3_bf16.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(own | {"data_types": {"grad_accum_dtype": "bf16"}}))
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"deepspeed": str(tmp_path / "own.json")}))
    arguments = ["--config", str(recipe), "--gpu", "h200", *NO_SHARDS]
    prediction, ds = predict(*parse([*arguments, "--model.activation_checkpointing", "true"]))
    tree = recipe_tree(prediction.run.config) | {"output_dir": f"/scratch/{'x' * 90}/[run]"}
    suggestion, file = make_suggestion(prediction, ds, tree), io.StringIO()
    show_suggestion(suggestion, Console(file=file, width=80))
    printed, _, deepspeed = re.split(r"(# its DeepSpeed file.*\n)", file.getvalue().partition("# the recipe\n")[2])
    assert yaml.safe_load(printed) == suggestion["recipe"] and json.loads(deepspeed) == suggestion["deepspeed"]
    # With checkpointing, the trainer sets this key, which must not stay if the suggestion turns checkpointing off.
    assert not ds["zero_optimization"]["memory_efficient_linear"]
    assert "memory_efficient_linear" not in suggestion["deepspeed"]["zero_optimization"]
    (tmp_path / "ds.json").write_text(json.dumps(suggestion["deepspeed"]))
    suggested = tmp_path / "suggested.yaml"
    suggested.write_text(yaml.safe_dump(suggestion["recipe"] | {"deepspeed": str(tmp_path / "ds.json")}))
    again, ds_again = predict(*parse(["--config", str(suggested), *arguments[2:]]))
    assert ds_again["data_types"] == {"grad_accum_dtype": "bf16"}  # or the suggestion would change the result
    assert again.fits and again.as_json()["seconds"] == suggestion["plan"]["seconds"]
    assert again.time.overlapped <= prediction.time.overlapped or not prediction.fits
    assert {key for key, _, _ in suggestion["reasons"]} >= {"loss.head", "model.activation_checkpointing"}


@pytest.mark.parametrize(("name", "model"), [("qwen3-0.6b", "Qwen3-0.6B"), ("gemma-3-4b", "Gemma-3-4B")])
def test_first_run_page_quotes_predictions(name: str, model: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
    cells = rf"\| \[{name}\]\S+ \| (\d+) (.+?) \| ([\d.]+) GiB \| ([\d.]+) h \| (\d+) GB \| (\d+) GB"
    ((gpus, gpu, memory, hours, checkpoint, disk),) = re.findall(cells, page)
    AutoConfig.for_model(**published_models()[model]).save_pretrained(tmp_path)
    cluster = ["--gpu", gpu.lower().replace(" ", ""), "--gpus_per_node", gpus]
    data = ["--max_seq_length", "8192", "--rows", "2335", "--languages", "10"]
    recipe = ["--config", f"pipeline/recipes/{name}.yaml", "--model.path", str(tmp_path)]
    prediction, _ = predict(*parse([*recipe, *cluster, *data]))
    assert f"{prediction.memory.peak / GIB:.1f}" == memory
    assert f"{438 * prediction.time.overlapped / 3600:.2f}" == hours
    size = 12e-9 * prediction.run.stats.parameters
    assert [f"{size:.0f}", f"{3 * size:.0f}"] == [checkpoint, disk]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpu", "h10"], ["h10", "h100, h200"]),
        (["--nodes", "0"], ["--nodes is 0"]),
        (["--gpus_per_node", "7"], ["7 ranks", "vocab_multiple"]),
        (["--training.train_batch_size", "60"], ["60", "8 ranks"]),
        (["--training.sequence_parallel_size", "3"], ["sequence_parallel_size 3 does not divide", "ranks, 8"]),
        (["--training.sequence_parallel_size", "8"], ["sequence_parallel_size 8", "28 attention heads"]),
        (["--loss.pooling_tokens", "hidden_states", "--loss.layer", "28"], ["loss.layer 28", "28 decoder layers"]),
        (["--training.train_batch"], ["unknown key", "training.train_batch_size"]),
        (["--deepspeed", "nowhere.json"], ["nowhere.json", "cannot read"]),
        (["--supervised_share", "1.5"], ["supervised_share", "between 0 and 1"]),
        (["--max_seq_length", "64"], ["--sequence_tokens is 256", "64 tokens of a row"]),
        (["--model.config", "null", "--model.path", "nowhere"], ["nowhere", "cannot load"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_predict_refuses_invalid_arguments(recipe: Path, arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        predict(*parse(["--config", str(recipe), *NO_SHARDS, *arguments]))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_predict_refuses_missing_shards(recipe: Path) -> None:
    with pytest.raises(UserError, match="no packed shards; give --max_seq_length and --rows"):
        predict(*parse(["--config", str(recipe)]))


def test_predict_refuses_unknown_vocab_size(recipe: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    del tree["model"]["config"]["vocab_size"]
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"set model.config.vocab_size"):
        predict(*parse(["--config", str(recipe), *NO_SHARDS]))


def test_command_prints_json_from_packed_shards(prepared: Prepared, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "own.yaml", prepared.shards, prepared.tokenizer, training__train_batch_size=4)
    arguments = ("--config", recipe, "--gpus_per_node", 2, "--gpu", "a100", "--json")
    plan = json.loads(python("-m", "pipeline.plan", *arguments).stdout)
    manifest = json.loads((prepared.shards / "manifest.json").read_text())
    assert plan["tokens_per_row"] == manifest["max_seq_length"] and plan["fits"] and plan["max_steps"] == 5


def test_command_refuses_missing_shards(recipe: Path) -> None:
    refuses(python("-m", "pipeline.plan", "--config", recipe), "no packed shards", "--max_seq_length")


def test_help_names_the_known_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    known = ", ".join(sorted(path.stem for path in (ROOT / "pipeline" / "common" / "hardware").glob("*.yaml")))
    assert known in " ".join(capsys.readouterr().out.split())

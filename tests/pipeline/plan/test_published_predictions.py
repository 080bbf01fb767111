"""The predictions of docs/first_run.md are those of the planner."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from pipeline.plan.__main__ import parse
from pipeline.plan.command import predict
from pipeline.plan.prediction import GIB
from tests.runs import ROOT

TEXT = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
STEPS = 438  # of three epochs over 2,335 rows
DATA = ["--max_seq_length", "8192", "--rows", "2335", "--languages", "10"]
OFFLOAD = ["--deepspeed", "ds_configs/zero3_offload.json"]
NAMES = {name.lower(): name for name in ("Qwen3-0.6B", "Qwen3-8B", "Llama-3.1-8B", "Gemma-3-4B")}
SMALL = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}


def save_config(model: str, folder: Path) -> Path:
    """Write the published configuration of a model. Qwen3-1.7B has that of Qwen3-0.6B with other sizes."""
    published = yaml.safe_load((ROOT / "pipeline" / "benchmarks" / "published.yaml").read_text())
    fields = published["Qwen3-0.6B"] | SMALL if model == "Qwen3-1.7B" else published[model]
    AutoConfig.for_model(**fields).save_pretrained(folder / model)
    return folder / model


def check(
    model: str, recipe: str, gpu: str, count: str, memory: str, hours: str, folder: Path, extra: list[str]
) -> None:
    """Compare the memory and the hours of a row with the plan of its run."""
    arguments = ["--config", str(ROOT / "pipeline" / "recipes" / f"{recipe}.yaml"), "--gpu", gpu]
    arguments += ["--gpus_per_node", count, "--model.path", str(save_config(model, folder)), *DATA, *extra]
    prediction, _ = predict(*parse(arguments))
    assert memory == f"{prediction.memory.peak / GIB:.1f}", (model, count)
    assert hours == f"{prediction.time.overlapped * STEPS / 3600:.2f}", (model, count)


def test_what_a_run_takes(tmp_path: Path) -> None:
    rows = re.findall(
        r"^\| (?:\[([\w.-]+)\]\(.*?\)|the same) \| (\d) (RTX 4090|H100) \| ([\d.]+) GiB \| ([\d.]+) h", TEXT, re.M
    )
    assert len(rows) == 8
    recipe = ""
    for name, count, gpu, memory, hours in rows:
        recipe = name or recipe
        check(NAMES[recipe], recipe, gpu.lower().replace(" ", ""), count, memory, hours, tmp_path, [])


@pytest.mark.parametrize(("model", "recipe"), [("Qwen3-1.7B", "qwen3-0.6b"), ("Gemma-3-4B", "gemma-3-4b")])
def test_one_gpu_of_24_gb(model: str, recipe: str, tmp_path: Path) -> None:
    ((memory, hours),) = re.findall(rf"^\| {model} .*? \| ([\d.]+) GiB \| \d+ GiB \| ([\d.]+) h", TEXT, re.M)
    check(model, recipe, "rtx4090", "1", memory, hours, tmp_path, OFFLOAD)

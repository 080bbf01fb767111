"""The predictions of README.md and of pages of docs are those of the planner."""

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from pipeline.plan.__main__ import parse
from pipeline.plan.command import predict
from pipeline.plan.prediction import GIB, Prediction
from tests.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_RUN, TRAINING, SCALING = (
    (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("first_run", "training", "scaling")
)
RECIPES = ROOT / "pipeline" / "recipes"
BF16 = ROOT / "ds_configs" / "zero3_bf16.json"
STEPS = 438  # of three epochs over 2,335 rows
DATA = ["--max_seq_length", "8192", "--rows", "2335", "--languages", "10"]
OFFLOAD = ["--deepspeed", "ds_configs/zero3_offload.json"]
NAMES = {name.lower(): name for name in ("Qwen3-0.6B", "Qwen3-8B", "Llama-3.1-8B", "Gemma-3-4B")}
SMALL = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
ADAPTERS = {"full": [], "LoRA": ["--model.adapter.r", "16"]}
VOCABULARY = ("loss", "input embeddings", "vocabulary shards")


def save_config(model: str, folder: Path) -> Path:
    """Write the published configuration of a model. Qwen3-1.7B has that of Qwen3-0.6B with other sizes."""
    published = yaml.safe_load((ROOT / "pipeline" / "benchmarks" / "published.yaml").read_text())
    fields = published["Qwen3-0.6B"] | SMALL if model == "Qwen3-1.7B" else published[model]
    AutoConfig.for_model(**fields).save_pretrained(folder / model)
    return folder / model


def plan(model: str, config: Path, folder: Path, *extra: object) -> Prediction:
    """Return the plan of a recipe for a model, with further arguments of the command."""
    arguments = ["--config", config, "--model.path", save_config(model, folder), *extra]
    return predict(*parse(list(map(str, arguments))))[0]


def check(
    model: str, recipe: str, gpu: str, count: str, memory: str, hours: str, folder: Path, extra: list[str]
) -> Prediction:
    """Compare the memory and the hours of a row with the plan of its run, and return the plan."""
    where = ["--gpu", gpu, "--gpus_per_node", count]
    prediction = plan(model, RECIPES / f"{recipe}.yaml", folder, *where, *DATA, *extra)
    assert memory == f"{prediction.memory.peak / GIB:.1f}", (model, count)
    assert hours == f"{prediction.time.overlapped * STEPS / 3600:.2f}", (model, count)
    return prediction


def test_readme(tmp_path: Path) -> None:
    (memory,) = re.findall(r"^\| memory per GPU \| ([\d.]+) GiB \| ([\d.]+) GiB", README, re.M)
    (hours,) = re.findall(r"^\| time \| ([\d.]+) h \| ([\d.]+) h", README, re.M)
    for count, of_gpu, of_run in zip("84", memory, hours, strict=True):
        check("Qwen2.5-7B", "qwen2.5-7b", "h100", count, of_gpu, of_run, tmp_path, [])


def test_what_a_run_takes(tmp_path: Path) -> None:
    rows = re.findall(
        r"^\| (?:\[([\w.-]+)\]\(.*?\)|the same) \| (\d) (RTX 4090|H100) \| ([\d.]+) GiB \| ([\d.]+) h", FIRST_RUN, re.M
    )
    assert len(rows) == 8
    recipe = ""
    for name, count, gpu, memory, hours in rows:
        recipe = name or recipe
        check(NAMES[recipe], recipe, gpu.lower().replace(" ", ""), count, memory, hours, tmp_path, [])


@pytest.mark.parametrize(("model", "recipe"), [("Qwen3-1.7B", "qwen3-0.6b"), ("Gemma-3-4B", "gemma-3-4b")])
def test_one_gpu_of_24_gb(model: str, recipe: str, tmp_path: Path) -> None:
    row = rf"^\| {model} .*? \| ([\d.]+) GiB \| (\d+) GiB \| ([\d.]+) h"
    ((memory, host, hours),) = re.findall(row, FIRST_RUN, re.M)
    prediction = check(model, recipe, "rtx4090", "1", memory, hours, tmp_path, OFFLOAD)
    assert host == f"{prediction.host_bytes / GIB:.0f}"


@pytest.mark.parametrize("variant", ADAPTERS)
def test_adapters_that_fit(variant: str, tmp_path: Path) -> None:
    """Two rows of 8B. What exceeds the memory without the reserve is in parentheses."""
    (cells,) = re.findall(rf"^\| 8B, {variant} \| [\d,]+ M \| (.*) \|$", TRAINING, re.M)
    small, *large = cells.split(" | ")
    rows = ["--max_seq_length", 4096, "--rows", 4670, "--languages", 10, *ADAPTERS[variant]]
    for count, cell in zip((1, 8), large, strict=True):
        prediction = plan("Qwen3-8B", RECIPES / "qwen2.5-7b.yaml", tmp_path, "--gpus_per_node", count, *rows)
        memory = f"{prediction.memory.peak / GIB:.1f}"
        assert cell == (memory if prediction.fits else f"({memory})")
        if count == 1:
            assert small == (memory if prediction.memory.peak <= (23.6 - 4) * GIB else f"({memory})")


@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Qwen3-8B"])
def test_longest_row_of_eight_gpus(model: str, tmp_path: Path) -> None:
    """Rows that eight GPUs share, and the CPU memory that offloading needs."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {shards: none}")
    run = ["--training.train_batch_size", 64, "--model.activation_checkpointing", "true"]
    data = [*run, "--rows", 1000, "--sequence_tokens", 4096, "--training.sequence_parallel_size", 8]
    rows = re.findall(rf"^\| {model}(, offload)? \| .* \| ([\d,]+) \|$", TRAINING, re.M)
    assert rows
    for offload, cell in rows:
        longest = int(cell.replace(",", ""))
        settings = [*data, *(OFFLOAD if offload else ["--deepspeed", BF16])]
        prediction = plan(model, recipe, tmp_path, *settings, "--max_seq_length", longest)
        assert prediction.fits, (model, offload)
        host = f"needs {prediction.host_bytes / GIB:.0f} GiB of CPU memory for {model.removeprefix('Qwen3-')}"
        assert not offload or host in " ".join(TRAINING.split())
        assert not plan(model, recipe, tmp_path, *settings, "--max_seq_length", longest + 1024).fits, (model, offload)


def hpz_row(model: str, gpus: int, recipe: Path, folder: Path) -> list[str]:
    """Return the cells that the planner gives for a model on a number of GPUs, without and with hpZ."""
    micro_batch = {"Qwen2.5-0.5B": 4, "Qwen2.5-7B": 2, "Qwen2.5-32B": 1}[model]
    cluster = ["--nodes", gpus // 8, "--max_seq_length", 4096, "--rows", 1_000_000, "--model.vocab_multiple", 1024]
    batch = ["--training.train_batch_size", 16 * gpus, "--training.train_micro_batch_size_per_gpu", micro_batch]
    checkpointing = ["--model.activation_checkpointing", str(micro_batch < 4).lower()]
    with_hpz = json.loads(BF16.read_text())
    with_hpz["zero_optimization"]["zero_hpz_partition_size"] = 8
    (folder / "hpz.json").write_text(json.dumps(with_hpz))
    settings = [*cluster, *batch, *checkpointing, "--deepspeed"]
    runs = [plan(model, recipe, folder, *settings, file) for file in (BF16, folder / "hpz.json")]
    without, with_it = (run.tokens_per_second / gpus for run in runs)
    received = []
    for run in runs:
        vocabulary = sum(t.between_nodes(gpus, 8) for t in run.transfers if t.name in VOCABULARY)
        received.append(f"{run.between_nodes() / 1e9:.2f} ({vocabulary / 1e9:.2f})")
    rates = [f"{without:,.0f}", f"{with_it:,.0f}", f"{with_it / without:.2f}"]
    return [*rates, *received, *(f"{run.memory.peak / GIB:.1f}" for run in runs)]


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-32B"])
def test_nodes_with_hpz(model: str, tmp_path: Path) -> None:
    """The first and the last number of GPUs with the head `gathered`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {shards: none}")
    table = SCALING.partition("### Nodes with hpZ, predicted")[2].partition(f"| {model} |")[2]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[:6]]
    rows = {int(gpus.replace(",", "")): cells for gpus, *cells in lines}
    assert list(rows) == [16, 64, 128, 256, 512, 1024]
    for gpus in (128, 1024):
        assert rows[gpus] == hpz_row(model, gpus, recipe, tmp_path), gpus

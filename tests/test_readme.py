"""README.md is run: every command in it, in its order, in a copy of the tree that holds links to the real one.

What a machine without GPU, Slurm, hub and hours cannot do is replaced by the nearest real thing, declared below. A
command that needs none of it runs as it stands; so a new one is either run or fails here.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.distributed import free_port
from pipeline.config.recipe import load_config
from pipeline.evaluation.answer_extraction import LANGUAGES
from pipeline.loss import LossSettings
from pipeline.models.families import FAMILIES
from tests.conftest import Prepared
from tests.runs import ENVIRONMENT, ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")

# (what the README says, what runs here, why). {port} is a free port. All apply to commands and to the recipe.
SUBSTITUTIONS = [
    ("make ", "make --dry-run ", "the demo takes minutes, and the tests would run themselves"),
    ("source .venv/bin/activate", "true", "the tests run in an environment already"),
    ("Qwen/Qwen3-0.6B", "tiny-model", "no hub: a model of the same family, made here"),
    ("--max_seq_length 2048", "--max_seq_length 512", "little data"),
    ("--vocab_size 16384", "--vocab_size 600", "little data"),
    ("mpirun -n 4", "mpirun --allow-run-as-root --oversubscribe -n 2", "few cores, and root in a container"),
    ("runs/mine/solar/tensorboard", "runs/mine/solar/tensorboard --inspect", "a server does not end"),
    ("train_batch_size: 64", "train_batch_size: 4", "little data"),
    ("num_train_epochs: 3", "max_steps: 2", "an epoch takes long"),
    ("deepspeed pipeline", "python pipeline", "no GPU, and a second to start: ONE_RANK stands in for the launcher"),
    ("--output_dir runs/mine/sft", "--output_dir runs/mine/sft --dry_run", "the run before it differs by one setting"),
    ("--output_dir runs/mine/words", "--output_dir runs/mine/words --dry_run", "likewise"),
    ("--num_accelerators 2", "--master_port={port} --num_accelerators 2", "other tests use the port too"),
    ("ds_configs/zero3.json", "ds_configs/zero3.json --output_dir runs/mine/cpu", "the run above is in its place"),
    ("--nodes 4 --gpus_per_node 8", "--nodes 1 --gpus_per_node 2", "a batch of 4 rows has no work for 32 GPUs"),
    ("--nproc-per-node 8", "--nproc-per-node 1 --master-port {port}", "few cores"),
    ("--max_new_tokens 512", "--max_new_tokens 8", "an untrained model does not end its answers"),
    ("-m pipeline.evaluation", "-m pipeline.evaluation --limit 2", "few problems will do"),
]

# Commands that are not run at all, by their beginning, and why.
NOT_RUN = {
    "sbatch ": "Slurm: tests/slurm submits it to a real cluster",
    "RECIPE=": "likewise",
    "MODEL=models": "likewise",
}

ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def fenced(language: str) -> Iterator[str]:
    """The README's code blocks in a language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in fenced("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def substituted(text: str) -> str:
    for said, runs, _ in SUBSTITUTIONS:
        if runs not in text:
            text = text.replace(said, runs)
    return text.replace("{port}", str(free_port()))


@pytest.fixture
def checkout(prepared: Prepared, tmp_path: Path) -> Path:
    """The tree as a reader has it, with data, a tiny model and the README's recipe."""
    for entry in ("pipeline", "data_prep", "ds_configs", "Makefile", "requirements.txt"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    records = [json.loads(line) for line in prepared.data.read_text(encoding="utf-8").splitlines()]
    renamed = [{"id" if key == "pair_id" else key: value for key, value in record.items()} for record in records]
    lines = "".join(json.dumps(record) + "\n" for record in renamed if int(record["id"][-5:]) < 16)
    (tmp_path / "records.jsonl").write_text(lines)
    (tmp_path / "test.jsonl").symlink_to(prepared.test)

    tokenizer = load_tokenizer(prepared.tokenizer)
    fields = {**TINY, "model_type": "qwen3", "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.save_pretrained(tmp_path / "tiny-model")
    tokenizer.save_pretrained(tmp_path / "tiny-model")

    (recipe,) = fenced("yaml")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").write_text(substituted(recipe))
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(checkout: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    exports: list[str] = []
    for command in commands():
        if any(command.startswith(beginning) for beginning in NOT_RUN):
            continue
        script = "\n".join(["set -eo pipefail", *exports, substituted(command)])
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=checkout,
            env={**ENVIRONMENT, **ONE_RANK, "MASTER_PORT": str(free_port()), "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (
            f"README: {command}\nrun as: {script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
        if command.startswith("export "):
            exports.append(substituted(command))

    run = checkout / "runs" / "mine" / "solar"
    for made in ("checkpoint-2/COMPLETE", "metrics.jsonl", "hf/model.safetensors", "evaluation.json", "report.png"):
        assert (run / made).is_file(), made
    assert (checkout / "runs" / "mine" / "cpu" / "checkpoint-2" / "rng-1.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(run / "hf").dtype == torch.bfloat16


def test_every_substitution_is_needed() -> None:
    text = "\n".join([*commands(), *fenced("yaml")])
    assert not [said for said, _, _ in SUBSTITUTIONS if said not in text]
    assert not [beginning for beginning in NOT_RUN if not any(c.startswith(beginning) for c in commands())]


def test_the_recipe_is_valid_as_it_stands(tmp_path: Path) -> None:
    (recipe,) = fenced("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    config = load_config(tmp_path / "recipe.yaml", [])
    assert config.model.path == yaml.safe_load(recipe)["model"]["path"]


def test_the_records_are_canonical() -> None:
    from data_prep.records import parse_record

    (records,) = fenced("json")
    parsed = [parse_record(json.loads(line)) for line in records.splitlines()]
    assert len({record.pair_id for record in parsed}) == 1 and len(parsed) == 2


def test_every_path_named_exists() -> None:
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != "runs")
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*)", README)
    assert len(paths) > 40
    assert not [path for path in paths if not (ROOT / path).exists()]
    inside = {path.name for folder in ("pipeline", "data_prep", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not [name for name in re.findall(r"`(\w+\.py)`", README) if name not in inside]


def test_the_map_has_every_module_of_the_pipeline() -> None:
    modules = sorted(path.name for path in (ROOT / "pipeline").glob("*.py") if path.name != "__init__.py")
    missing = [name for name in modules if f"pipeline/{name}`" not in README and f"`{name}`" not in README]
    assert not missing, f"say in README.md, under The tree, what these are: {missing}"


def slug(heading: str) -> str:
    """The anchor that a Git host gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_relative_links_resolve(page: str) -> None:
    file = ROOT / page
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (file.parent / target).resolve() if target else file
        assert path.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {link}"


def test_lists_of_families_and_languages_are_the_codes() -> None:
    (families,) = re.findall(r"- Model families: (.*?)\.\n", README, re.DOTALL)
    assert re.findall(r"`(\w+)`", families) == list(FAMILIES)
    (languages,) = re.findall(r"reads answers in (.*?), and only", README)
    assert re.findall(r"\b[a-z]{2}\b", languages.replace("and ", "")) == sorted(LANGUAGES)


def test_every_setting_of_the_loss_is_explained_with_its_default() -> None:
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \(`?(.*?)`?\) \|", method, re.MULTILINE))
    settings = asdict(LossSettings())
    assert list(rows) == list(settings)
    for name, value in settings.items():
        said = yaml.safe_load(rows[name])
        assert said == (list(value) if isinstance(value, tuple) else value), name

"""Run every command of README.md in order, and check that README and docs agree with the tree.

The commands run in a directory of links to this tree. What a machine without GPU, Slurm, network or hours cannot do is
declared below: SUBSTITUTIONS are applied to commands that run, NOT_RUN lists the ones that do not. A new command is
therefore either run or fails here.
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

from data_prep.convert.benchmarks import LANGUAGE_NAMES
from data_prep.records import parse_record
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.launcher import free_port
from pipeline.evaluation.answers.language_rules import ANSWER_LANGUAGES
from pipeline.loss import LossSettings
from tests.conftest import Prepared
from tests.runs import ENVIRONMENT, ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

FEW_STEPS = "--training.train_batch_size 2 --training.train_micro_batch_size_per_gpu 1 --training.max_steps 2"
DRY_RUN = "python pipeline/train.py --config $RECIPE --model.path $MODEL --dry"

# (text of the README, what runs in its place, why)
SUBSTITUTIONS = [
    ("make ", "make --dry-run ", "the demo takes minutes, and the tests would start themselves"),
    ("source .venv/bin/activate", "true", "the tests already run in an environment"),
    ("--max_seq_length 4096", "--max_seq_length 512", "there is little data, and long rows are slow on a CPU"),
    ("deepspeed pipeline/train.py --config $RECIPE --model.path $MODEL --dry", DRY_RUN, "the launcher takes seconds"),
    ("deepspeed pipeline", "deepspeed --num_accelerators 1 --master_port $MASTER_PORT pipeline", "one rank is enough"),
    ("-0.5b.yaml", f"-0.5b.yaml FEW_STEPS='{FEW_STEPS}'", "an epoch takes long"),
    ("train.py --config $RECIPE", "train.py --config $RECIPE $FEW_STEPS", "likewise"),
    ("-m pipeline.evaluation", "-m pipeline.evaluation --limit 2 --max_new_tokens 8", "generation on a CPU is slow"),
]

# Commands that are not run, by their beginning, and why.
NOT_RUN = {
    "hf download ": "there is no hub; the fixture creates what it would download",
    "git clone ": "there is no network; likewise",
    "INPUT=": "Slurm: tests/slurm submits the scripts to a real cluster",
    "sbatch ": "likewise",
    "RUN=": "likewise",
}

ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def fenced(language: str) -> Iterator[str]:
    """Yield the README's code blocks in a language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the README's commands, with continued lines joined and comments dropped."""
    lines = [line for block in fenced("bash") for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def substitute(text: str) -> str:
    for original, replacement, _ in SUBSTITUTIONS:
        text = text.replace(original, replacement)
    return text


def write_mgsm8kinstruct(records: list[dict[str, str]], path: Path) -> None:
    """Write records as MathOctopus publishes them, for the languages of that data set."""
    names = {code: name for name, code in LANGUAGE_NAMES.items()}
    prompt = "Please answer in {}.\n\n### Instruction:\n{}\n\n### Response:"
    rows = [
        {"prompt": prompt.format(names[record["lang"]], record["question"]), "chosen": record["answer"]}
        for record in records
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_mgsm(records: list[dict[str, str]], folder: Path) -> None:
    """Write records as MGSM publishes them: one TSV per language, rows aligned."""
    folder.mkdir(parents=True)
    for lang in sorted({record["lang"] for record in records}):
        rows = sorted((r["pair_id"], r["question"], r["gold"]) for r in records if r["lang"] == lang)
        (folder / f"mgsm_{lang}.tsv").write_text("".join(f"{question}\t{gold}\n" for _, question, gold in rows))


def read_records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def checkout(prepared: Prepared, tmp_path: Path) -> Path:
    """A directory of links to the tree, with what the README's downloads would leave there."""
    for entry in ("pipeline", "data_prep", "ds_configs", "Makefile", "requirements.txt"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    (tmp_path / "downloads").mkdir()
    write_mgsm8kinstruct(read_records(prepared.data), tmp_path / "downloads" / "MGSM8KInstruct_Parallel.json")
    write_mgsm(read_records(prepared.test), tmp_path / "downloads" / "url-nlp" / "mgsm")

    # The planner reads the configuration of the 7B model and nothing else.
    published = yaml.safe_load((ROOT / "pipeline" / "benchmarks" / "published.yaml").read_text())["Qwen2.5-7B"]
    large, small = tmp_path / "models" / "Qwen2.5-7B-Instruct", tmp_path / "models" / "Qwen2.5-0.5B-Instruct"
    AutoConfig.for_model(**published).save_pretrained(large)

    tokenizer = load_tokenizer(prepared.tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(small)
    tokenizer.save_pretrained(small)
    return tmp_path


@pytest.mark.slow
def test_readme_commands_run(checkout: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    exports: list[str] = []
    output = ""
    for command in commands():
        if command.startswith(tuple(NOT_RUN)):
            continue
        script = "\n".join(["set -eo pipefail", *exports, substitute(command)])
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=checkout,
            env={**ENVIRONMENT, **ONE_RANK, "MASTER_PORT": str(free_port()), "PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        output += result.stdout
        assert result.returncode == 0, (
            f"README: {command}\nrun as: {script}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        )
        if command.startswith("export "):
            exports.append(substitute(command))

    run = checkout / "runs" / "qwen2.5-0.5b"
    for name in ("checkpoint-2/COMPLETE", "metrics.jsonl", "hf/model.safetensors", "evaluation.json", "report.html"):
        assert (run / name).is_file(), name
    assert AutoModelForCausalLM.from_pretrained(run / "hf").dtype == torch.bfloat16

    # The table of what a 7B run needs quotes the planner.
    (memory,) = re.findall(r"It fits: ([\d.]+) of", output)
    steps, hours = re.findall(r"the recipe's (\d+) steps\s+│\s+([\d.]+) h", output)[0]
    for quoted in (f"| {memory} GiB |", f"{steps} steps", f"| {hours} h |"):
        assert quoted in README, quoted


def test_readme_substitutions_and_exceptions_apply() -> None:
    text = "\n".join(commands())
    assert not [original for original, _, _ in SUBSTITUTIONS if original not in text]
    assert not [beginning for beginning in NOT_RUN if not any(c.startswith(beginning) for c in commands())]


def test_readme_length_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_readme_records_are_canonical() -> None:
    (records,) = fenced("json")
    parsed = [parse_record(json.loads(line)) for line in records.splitlines()]
    assert len({record.pair_id for record in parsed}) == 1 and len(parsed) == 2


def test_readme_limits_list_hand_written_languages() -> None:
    (languages,) = re.findall(r"Rules for (.*?) are hand-written", README)
    assert re.findall(r"\b[a-z]{2}\b", languages.replace("and ", "")) == sorted(ANSWER_LANGUAGES)


@pytest.mark.parametrize("page", PAGES)
def test_page_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != "runs")
    # `a/{b,c}.py` names two files.
    named = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*(?:\{{[\w,]+\}}[\w.]*)?)", text)
    paths = [path for name in named for path in expand_braces(name.rstrip("."))]
    assert not [path for path in paths if not exists_or_is_prefix(ROOT / path)]
    modules = {name for name in re.findall(r"python -m ((?:pipeline|data_prep|tests)[\w.]*)", text)}
    assert not [name for name in modules if not is_module(name.rstrip("."))]


@pytest.mark.parametrize("page", PAGES)
def test_page_export_commands_are_complete(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"python -m pipeline\.export (--[^`\n]*)", text)
    assert not [command for command in commands if not {"--checkpoint", "--output"} <= set(command.split())]


def test_architecture_page_functions_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text() for folder in ("pipeline", "data_prep") for path in (ROOT / folder).rglob("*.py"))
    functions = set(re.findall(r"`(\w+)\(\)`", text))
    assert functions and not [name for name in functions if f"def {name}(" not in code]


def expand_braces(path: str) -> list[str]:
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [match[1] + part + match[3] for part in match[2].split(",")] if match else [path]


def exists_or_is_prefix(path: Path) -> bool:
    """Accept an output prefix as well, such as docs/bench/scale of scale.csv and scale.png."""
    return path.exists() or any(path.parent.glob(f"{path.name}.*"))


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def slug(heading: str) -> str:
    """Return the anchor that a Git host gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_page_relative_links_resolve(page: str) -> None:
    file = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (file.parent / target).resolve() if target else file
        assert path.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {link}"


def test_method_page_explains_every_loss_setting_with_its_default() -> None:
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = "".join(line for line in method.splitlines(keepends=True) if line.startswith("| "))
    defaults = dict(re.findall(r"`(\w+)` \(`?([^`,)]*)`?[,)]", table))
    settings = asdict(LossSettings())
    assert sorted(defaults) == sorted(settings)
    for name, value in settings.items():
        documented = yaml.safe_load(defaults[name])
        assert documented == (list(value) if isinstance(value, tuple) else value), name

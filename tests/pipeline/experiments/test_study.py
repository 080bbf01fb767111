"""The whole experiment in miniature, by its command; and what stops it."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.common.errors import UserError
from pipeline.experiments import study
from pipeline.experiments.__main__ import PLAN
from pipeline.experiments.plan import read_plan
from tests.runs import python, refuses

SHORT = {"train_batch_size": 8, "max_steps": 4, "learning_rate": 0.001, "precision": "fp32"}
TREE = {
    "arms": {
        "sft": {},
        "ours": {"idf": True, "loss": {"distance": "mse", "detach": ["pivot", "probabilities"]}},
        "middle": {"middle": 0.3, "amounts": [3]},
        "dictionary": {"dictionary": 1.0, "amounts": [3]},
        "shuffled": {"shuffle": True, "loss": {}, "amounts": [3]},
    },
    "amounts": [3, 2],
    "seeds": [1, 2],
    "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mid_problems": 4,
    "test_problems": 2,
    "pretraining": SHORT,
    "finetuning": SHORT,
}


def write_plan(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(TREE | changes))
    return path


def run(plan: Path, output: Path, seed: int = 1) -> None:
    read = read_plan(plan)
    study.Study(read, seed, output).run(read.amounts, print)


@pytest.mark.slow
def test_every_arm_from_base_to_table_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "COPY_GATE", 0.0)  # so short a pretraining does not learn to copy
    plan, output = write_plan(tmp_path / "plan.yaml"), tmp_path / "out"
    for seed in (1, 2):
        run(plan, output, seed)
    names = {path.name for path in (output / "seed-1").glob("*.json")}
    assert names == {"base.json", "sft-3.json", "ours-3.json", "middle-3.json", "dictionary-3.json", "shuffled-3.json",
                     "sft-2.json", "ours-2.json"}  # fmt: skip
    figures = {name: json.loads((output / "seed-1" / name).read_text()) for name in names}
    arms = [figures[name] for name in sorted(names) if name.endswith("-3.json")]
    assert len({arm["word_centred_cosine"] for arm in arms}) == 5  # every arm did something else
    assert all(0 <= arm["low"] <= 1 for arm in arms)

    again = (output / "seed-1" / "ours-3.json").stat().st_mtime_ns
    (output / "seed-1" / "ours-2.json").unlink()
    run(plan, output)
    assert (output / "seed-1" / "ours-3.json").stat().st_mtime_ns == again
    assert json.loads((output / "seed-1" / "ours-2.json").read_text()) == figures["ours-2.json"]  # the same bits


@pytest.mark.slow
def test_the_command_stops_at_the_gate_and_names_what_failed(tmp_path):
    plan = write_plan(tmp_path / "plan.yaml")
    command = ["-m", "pipeline.experiments", "--plan", plan, "--output", tmp_path / "out"]
    result = python(*command)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert ["the base copies the digits in" in line for line in errors] == [True, True, False]
    assert errors[2].startswith("error: seeds 1, 2 failed")
    refuses(python(*command, "--seeds", "[5]"), "--seeds [5] are not in")
    other = write_plan(tmp_path / "other.yaml", mid_problems=5)
    refuses(
        python("-m", "pipeline.experiments", "--plan", other, "--output", tmp_path / "out"),
        "of another plan (other: mid_problems)",
    )


@pytest.mark.parametrize("name", ["plan.yaml", "screening.yaml"])
def test_the_projects_plans_are_whole(name):
    plan = read_plan(PLAN.parent / name)
    assert all(arm.amounts is None or set(arm.amounts) <= set(plan.amounts) for arm in plan.arms.values())


def test_final_and_screening_share_no_seed():
    final, screening = (read_plan(PLAN.parent / name) for name in ("plan.yaml", "screening.yaml"))
    assert not set(final.seeds) & set(screening.seeds)
    assert len(set(final.seeds)) >= 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"ours": {}}}, "no arm 'sft'"),
        ({"arms": {"sft": {"los": {}}}}, "arm 'sft' must be"),
        ({"amounts": [0]}, "amounts at least 1"),
        ({"seeds": []}, "seeds and amounts"),
        ({"finetuning": {"max_step": 3}}, "max_step"),
    ],
)
def test_bad_plans_are_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read_plan(write_plan(tmp_path / "plan.yaml", **changes))
    assert "\n" not in str(error.value) and "plan.yaml" in str(error.value)


def test_missing_plan_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read the plan"):
        read_plan(tmp_path / "no.yaml")

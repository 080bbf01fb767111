"""Test a small experiment from its command line to its tables, and the errors that stop it."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.common.errors import UserError
from pipeline.experiments import study
from pipeline.experiments.__main__ import PLAN
from pipeline.experiments.plan import read_experiment_plan
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
    """Write a plan of few and short trainings."""
    path.write_text(yaml.safe_dump(TREE | changes))
    return path


def run(plan: Path, output: Path) -> None:
    loaded = read_experiment_plan(plan)
    study.Study(loaded, 1, output).run(loaded.amounts, print)


@pytest.mark.slow
def test_study_trains_every_variant_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MIN_COPY_ACCURACY", 0.0)  # a short pretraining does not learn to copy
    plan, output = write_plan(tmp_path / "plan.yaml"), tmp_path / "out"
    run(plan, output)
    names = {path.name for path in (output / "seed-1").glob("*.json")}
    assert names == {"base.json", "sft-3.json", "ours-3.json", "middle-3.json", "dictionary-3.json", "shuffled-3.json",
                     "sft-2.json", "ours-2.json"}  # fmt: skip
    metrics = {name: json.loads((output / "seed-1" / name).read_text()) for name in names}
    variants = [metrics[name] for name in sorted(names) if name.endswith("-3.json")]
    assert len({variant["word_centred_cosine"] for variant in variants}) == 5  # all of them train differently
    assert all(0 <= variant["low"] <= 1 for variant in variants)

    written = (output / "seed-1" / "ours-3.json").stat().st_mtime_ns
    (output / "seed-1" / "ours-2.json").unlink()
    run(plan, output)
    assert (output / "seed-1" / "ours-3.json").stat().st_mtime_ns == written
    assert json.loads((output / "seed-1" / "ours-2.json").read_text()) == metrics["ours-2.json"]  # bit for bit


@pytest.mark.slow
def test_experiment_stops_if_sanity_check_fails(tmp_path):
    plan = write_plan(tmp_path / "plan.yaml")
    command = ["-m", "pipeline.experiments", "--plan", plan, "--output", tmp_path / "out"]
    result = python(*command)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert ["the base model copies all digits in only" in line for line in errors] == [True, True, False]
    assert errors[2].startswith("error: seeds 1, 2 failed")
    refuses(python(*command, "--seeds", "[5]"), "--seeds [5] are not in")
    other = write_plan(tmp_path / "other.yaml", mid_problems=5)
    refuses(
        python("-m", "pipeline.experiments", "--plan", other, "--output", tmp_path / "out"),
        "of a different plan, which differs in mid_problems",
    )


@pytest.mark.parametrize("name", ["plan.yaml", "screening.yaml"])
def test_read_plan_accepts_plans_of_the_project(name):
    plan = read_experiment_plan(PLAN.parent / name)
    assert all(set(variant.amounts or []) <= set(plan.amounts) for variant in plan.variants.values())


def test_plans_of_the_project_share_no_seed():
    final, screening = (read_experiment_plan(PLAN.parent / name) for name in ("plan.yaml", "screening.yaml"))
    assert not set(final.seeds) & set(screening.seeds)
    assert len(set(final.seeds)) >= 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"ours": {}}}, "arms has no 'sft'"),
        ({"arms": {"sft": {"los": {}}}}, "arms.sft must be"),
        ({"amounts": [0]}, "amounts must be at least 1"),
        ({"seeds": []}, "seeds and amounts must not be empty"),
        ({"finetuning": {"max_step": 3}}, "max_step"),
        ({"pretraining": {"train_batch_size": 8}}, "set max_steps"),
    ],
)
def test_read_plan_refuses_invalid_plan(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read_experiment_plan(write_plan(tmp_path / "plan.yaml", **changes))
    assert "\n" not in str(error.value) and "plan.yaml" in str(error.value)


def test_read_plan_refuses_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the plan"):
        read_experiment_plan(tmp_path / "no.yaml")

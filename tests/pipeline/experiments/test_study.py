"""Test a small experiment from its command line to its tables, and the errors that stop it."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.common.errors import UserError
from pipeline.experiments import study
from pipeline.experiments.__main__ import PLAN, save_plan
from pipeline.experiments.plan import ExperimentPlan, read_experiment_plan
from pipeline.experiments.results import write_experiment_results
from tests.runs import python, refuses

SHORT = {"train_batch_size": 8, "max_steps": 4, "learning_rate": 0.001, "precision": "fp32"}
TREE = {
    "arms": {
        "sft": {},
        "ours": {"idf": True, "loss": {"distance": "mse", "detach": ["pivot", "probabilities"]}},
        "hard": {"hard": 2.0, "loss": {"pooling_tokens": "hard"}, "worlds": ["main"]},
        "middle": {"middle": {"weight": 0.3, "layer": 2, "temperature": 0.1, "alternate": True}, "worlds": ["main"]},
        "translate": {"translation_steps": 2, "worlds": ["main"]},
        "dictionary": {"dictionary": 1.0, "worlds": ["main"]},
        "shuffled": {"shuffle": True, "loss": {}, "worlds": ["main"]},
    },
    "worlds": {
        "main": {"pairs": 3},
        "other": {
            "pairs": 2,
            "benchmark": {"subwords": True},
            "model": {"hidden_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": True},
            "max_seeds": 1,
        },
        "slow": {"pairs": 3, "embedding_rate": 0.1, "max_seeds": 0},
    },
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
    for world in loaded.worlds:
        if 1 in loaded.seeds_of(world):
            study.Study(loaded, world, 1, output).run(print)


@pytest.mark.slow
def test_study_trains_every_variant_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MIN_COPY_ACCURACY", 0.0)  # a short pretraining does not learn to copy
    plan, output = write_plan(tmp_path / "plan.yaml"), tmp_path / "out"
    run(plan, output)
    main, other = output / "seed-1" / "main", output / "seed-1" / "other"
    assert {path.stem for path in main.iterdir()} == set(TREE["arms"])
    assert {path.stem for path in other.iterdir()} == {"sft", "ours"}
    metrics = {path.stem: json.loads(path.read_text()) for path in main.iterdir()}
    assert len({variant["word_centred_cosine"] for variant in metrics.values()}) == len(
        metrics
    )  # they train differently
    assert all(0 <= variant["low"] <= 1 for variant in metrics.values())
    assert {name for name in metrics if 0 < metrics[name].get("gradient_share", 0) < 1} == set(metrics) - {
        "sft",
        "translate",
    }

    written = (main / "ours.json").stat().st_mtime_ns
    before = json.loads((other / "ours.json").read_text())
    (other / "ours.json").unlink()
    run(plan, output)
    assert (main / "ours.json").stat().st_mtime_ns == written
    assert json.loads((other / "ours.json").read_text()) == before  # bit for bit

    copies = dict.fromkeys(json.loads((output / "seed-1" / "base-main.json").read_text())["copies"], 1.0)
    (output / "seed-1" / "base-main.json").write_text(json.dumps({"copies": copies}))
    for name in ("ours", "hard"):
        (main / f"{name}.json").unlink()
    result = python("-m", "pipeline.experiments", "--plan", plan, "--output", output, "--seeds", "[1]",
                    "--worlds", "[main]", "--variants", "[sft, hard]")  # fmt: skip
    assert result.returncode == 0 and json.loads((main / "hard.json").read_text()) == metrics["hard"], result.stderr
    assert not (main / "ours.json").exists()
    (main / "ours.json").write_text(json.dumps(metrics["ours"]))

    loaded = read_experiment_plan(plan)
    assert [loaded.seeds_of(world) for world in loaded.worlds] == [[1, 2], [1], []]
    shutil.copytree(output / "seed-1", output / "seed-2")
    text = write_experiment_results(loaded, output)
    assert "| shuffled |" in text and "World other: 2 pairs" in text
    lines = (output / "results.csv").read_text().splitlines()
    assert lines[0] == "seed,world,arm,measure,value"
    assert f"1,main,ours,word_cosine,{metrics['ours']['word_cosine']:.8g}" in lines


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
    refuses(python(*command, "--variants", "[sft, magic]"), "--variants ['magic'] are not in")
    other = write_plan(tmp_path / "other.yaml", mid_problems=5)
    refuses(
        python("-m", "pipeline.experiments", "--plan", other, "--output", tmp_path / "out"),
        "of a different plan, which differs in mid_problems",
    )


def test_save_plan_accepts_plan_from_before_an_option(tmp_path):
    plan = read_experiment_plan(write_plan(tmp_path / "plan.yaml"))
    save_plan(plan, tmp_path / "out")
    saved = tmp_path / "out" / "plan.yaml"
    tree = yaml.safe_load(saved.read_text())
    assert tree["worlds"]["main"]["benchmark"].pop("paraphrase") is False
    saved.write_text(yaml.safe_dump(tree))
    save_plan(plan, tmp_path / "out")
    tree["worlds"]["main"]["benchmark"]["paraphrase"] = True
    saved.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"differs in worlds\.main"):
        save_plan(plan, tmp_path / "out")


def project_plan(name: str) -> ExperimentPlan:
    return read_experiment_plan(PLAN.parent / name)


def test_screening_gives_all_families_equal_budgets():
    screening = project_plan("screening.yaml")
    trials = Counter(variant.family for name, variant in screening.arms.items() if name != "sft")
    assert len(set(trials.values())) == 1
    for name in ("plan.yaml", "worlds.yaml", "embedding_rate.yaml", "control.yaml", "stems.yaml"):
        plan = project_plan(name)
        assert {variant.family for variant in plan.arms.values()} - {None} <= set(trials)
        assert not set(plan.seeds) & set(screening.seeds)
        assert (plan.model, plan.pretraining) == (screening.model, screening.pretraining)
        rate = 0.1 if name == "embedding_rate.yaml" else 1.0
        assert plan.finetuning.learning_rate == pytest.approx(rate * screening.finetuning.learning_rate)
        assert replace(plan.finetuning, learning_rate=1.0) == replace(screening.finetuning, learning_rate=1.0)


def test_pilot_has_variants_of_screening_and_larger_model():
    pilot, screening = project_plan("pilot.yaml"), project_plan("screening.yaml")
    assert {v.family for v in pilot.arms.values()} <= {v.family for v in screening.arms.values()} | {None}
    for world in pilot.worlds:
        size = pilot.model_of(world)
        layers = size.num_hidden_layers * (4 + 3 * 3) * size.hidden_size**2  # q, k, v, o; an MLP three times as wide
        assert 50e6 < layers < 100e6


def test_worlds_with_equal_benchmark_and_model_share_base():
    plan = project_plan("plan.yaml")
    assert [plan.base_of(world) for world in plan.worlds] == ["main", "tied_subwords", "main", "main"]
    assert plan.finetuning_of("rate_01").embedding_learning_rate == pytest.approx(0.1 * plan.finetuning.learning_rate)
    assert plan.finetuning_of("main") == plan.finetuning


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"ours": {}}}, "arms has no 'sft'"),
        ({"arms": {"sft": {"los": {}}}}, "arms.sft must be"),
        ({"worlds": {"main": {"pairs": 0}}, "arms": {"sft": {}}}, "worlds.main.pairs must be at least 1"),
        ({"worlds": {"main": {"pair": 1}}}, "worlds.main must be"),
        ({"arms": {"sft": {}, "x": {"worlds": ["no"]}}}, "arms.x.worlds has .'no'."),
        ({"arms": {"sft": {}, "x": {"middle": {"weight": 1, "layer": 3}}}}, "arms.x.middle.layer is not"),
        (
            {"primary": [{"variant": "hard", "baseline": "sft", "world": "other"}]},
            "primary has .*the plan does not run",
        ),
        ({"seeds": []}, "seeds and worlds must not be empty"),
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

"""The jobs of a study, the choice of settings, and what may not change once it has begun."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_prep.derive import KINDS
from pipeline.common.errors import UserError
from pipeline.config.fields import value_of
from pipeline.config.recipe import load_config
from pipeline.study.local import report_command
from pipeline.study.plan import (
    begin_study,
    common_arguments,
    plan_jobs,
    read_variants,
    trial_arguments,
    variant_arguments,
)
from pipeline.study.results import choose_settings, compare_variants
from pipeline.study.settings import StudySettings, read_study
from tests.conftest import Prepared
from tests.pipeline.test_compare import write_run
from tests.runs import write_recipe


@pytest.fixture
def with_trials(study: StudySettings, tmp_path: Path) -> StudySettings:
    dev = tmp_path / "dev.jsonl"
    records = [{"pair_id": "d", "lang": lang, "question": "1 + 1?", "gold": "2"} for lang in ("en", "sw")]
    dev.write_text("".join(json.dumps(record) + "\n" for record in records))
    return replace(study, dev=str(dev), variants=("sft", "solar", "shuffled_pairs"))


def write_evaluated(run: Path, correct: dict[tuple[str, str], bool], seed: int | None = None) -> None:
    write_run(run, correct, seed=seed)
    scores: dict[str, list[bool]] = {}
    for (_, lang), right in correct.items():
        scores.setdefault(lang, []).append(right)
    languages = {lang: {"accuracy": sum(values) / len(values)} for lang, values in scores.items()}
    evaluation = {"model": {"dtype": "float32"}, "languages": languages}
    (run / "evaluation.json").write_text(json.dumps(evaluation))


def test_declared_variants() -> None:
    baseline, factors, variants = read_variants()
    names = {"sft", "solar", "hard_tokens", "question_translation", "shuffled_pairs", "mid_align", "words"}
    assert baseline == "sft" and factors[0] == 1 and set(variants) == names
    assert {variant.data for variant in variants.values()} == {"records", *KINDS}


@pytest.mark.parametrize("name", read_variants()[2])
def test_variant_changes_the_recipe(name: str, study: StudySettings) -> None:
    variant = read_variants()[2][name]
    arguments = variant_arguments(study, variant)
    assert all(" " not in argument for argument in arguments)
    config = load_config(study.recipe, common_arguments(study, study.root) + arguments)
    for key, expected in variant.settings.items():
        value = value_of(config, key)
        if isinstance(expected, str):
            expected = expected.replace("{weights}", f"{study.output}/weights.safetensors")
        assert (list(value) if isinstance(value, tuple) else value) == expected
    tuned = value_of(config, variant.tuned)
    assert tuned > 0 and trial_arguments(study, variant, 3.0) == [f"--{variant.tuned}", f"{3 * tuned:.6g}"]


def test_begin_study_refuses_variants_that_do_not_fit_the_recipe(study: StudySettings) -> None:
    lora = replace(study, train_args="--model.adapter.r 4")
    for name in ("hard_tokens", "words"):
        with pytest.raises(UserError, match=f"--variants: {name}: .*the adapter freezes the embeddings"):
            begin_study(replace(lora, variants=("sft", name)))
    with pytest.raises(UserError, match=r"--variants: solar: .*loss\.alignment_weight is 0, so it would be plain"):
        begin_study(replace(study, train_args="--loss.alignment_weight 0", variants=("sft", "solar")))
    assert not study.root.exists()
    begin_study(replace(lora, variants=("sft", "solar", "mid_align")))


def test_jobs_tune_every_variant_alike_before_the_test_split(with_trials: StudySettings) -> None:
    study = begin_study(with_trials)
    jobs = {job.name: job for job in plan_jobs(study)}
    _, factors, _ = read_variants()
    for name in study.variants:
        trials = [job for job in jobs.values() if job.name.startswith(f"train-{name}-trial")]
        assert len(trials) == len(factors)
        assert all(job.variables.get("CHOICE") is None and "--seed" not in job.arguments for job in trials)
    evaluations = [job for job in jobs.values() if job.kind == "evaluate"]
    on_test = [job for job in evaluations if job.variables["DATA"] == study.test]
    assert {job.name for job in on_test} == {
        "evaluate-base", *(f"evaluate-{name}-seed{seed}" for name in study.variants for seed in study.seeds)
    }  # fmt: skip
    assert set(jobs["choose"].after) == {job.name for job in evaluations if job not in on_test}
    solar = jobs["train-solar-seed2"]
    assert solar.after == ("prepare-records", "choose")
    assert solar.variables["CHOICE"].endswith("choices/solar.args") and solar.arguments[-2:] == ("--seed", "2")
    assert jobs["train-shuffled_pairs-seed1"].after[0] == "prepare-shuffled_pairs"
    assert jobs["prepare-shuffled_pairs"].variables["DERIVE"] == "shuffled_pairs"
    assert set(jobs["compare"].after) == {job.name for job in on_test}
    names = list(jobs)
    assert all(names.index(earlier) < names.index(name) for name, job in jobs.items() for earlier in job.after)


def test_choice_is_best_trial_of_primary_measure_and_kept(with_trials: StudySettings) -> None:
    study = begin_study(replace(with_trials, primary=("sw",), variants=("sft", "solar")))
    right = {"sft": (2, 3, 3), "solar": (0, 1, 4)}  # of four answers in sw, by trial
    for name, counts in right.items():
        for number, count in enumerate(counts, start=1):
            correct = {(str(i), "sw"): i < count for i in range(4)} | {(str(i), "en"): i >= count for i in range(4)}
            write_evaluated(study.trial(name, number), correct)
    choose_settings(study)
    assert study.choice("sft").read_text().splitlines() == ["--training.learning_rate", "0.0009"]  # the first of two
    assert study.choice("solar").read_text().splitlines() == ["--loss.alignment_weight", "3"]
    assert all(job.done for job in plan_jobs(study) if job.kind in ("choose", "evaluate") and "trial" in job.name)
    write_evaluated(study.root / "better", dict.fromkeys(correct, True))
    (study.trial("solar", 1) / "evaluation.json").write_text((study.root / "better" / "evaluation.json").read_text())
    choose_settings(study)
    assert study.choice("solar").read_text().splitlines() == ["--loss.alignment_weight", "3"]
    for trial in study.root.glob("*-trial*"):  # to free disk space
        shutil.rmtree(trial)
    study = begin_study(replace(study, variants=("sft", "hard_tokens"), seeds=(4,)))
    trials = {job.name: job.done for job in plan_jobs(study) if "trial" in job.name}
    assert len(trials) == 18 and all(done == ("hard_tokens" not in name) for name, done in trials.items())


def test_variants_are_compared_over_seeds(study: StudySettings) -> None:
    study = begin_study(replace(study, variants=("sft", "solar", "shuffled_pairs"), seeds=(1, 2, 5)))
    keys = [(str(i), lang) for i in range(30) for lang in ("en", "sw")]
    for name, right in (("base", 5), ("sft", 10), ("solar", 24), ("shuffled_pairs", 11)):
        for seed in study.seeds:
            run = study.root / "base" if name == "base" else study.run(name, seed)
            if not (run / "generations.jsonl").exists():
                (run / "hf").unlink(missing_ok=True)
                if run.exists():
                    run.rmdir()
                write_evaluated(run, {key: int(key[0]) < right + seed % 2 for key in keys}, seed=seed)
    text = compare_variants(study)
    result = json.loads((study.root / "results.json").read_text())["variants"]
    assert result["solar"]["difference"] == pytest.approx(14 / 30)
    assert result["sft"]["accuracy"] == pytest.approx([11 / 30, 10 / 30, 11 / 30])
    assert "p" not in result["sft"] and "p" not in result["base"]
    assert result["solar"]["p_holm"] == pytest.approx(2 * result["solar"]["p"])
    assert "| sft | 35.6 | 1.9 |  |  |  |  |  |" in text
    assert json.loads((study.root / "solar" / "comparison.json").read_text())["seeds"] == [1, 2, 5]


def test_study_grows_but_its_measure_and_test_split_are_fixed(study: StudySettings, tmp_path: Path) -> None:
    begin_study(study)
    grown = begin_study(replace(study, variants=("sft", "solar"), seeds=(4,)))
    assert grown.variants == ("sft", "shuffled_pairs", "solar") and grown.seeds == (1, 2, 4)
    assert read_study(study.root) == grown
    with pytest.raises(UserError, match=r"study\.json: .* another primary \(\['mean'\], now \['sw'\]\)"):
        begin_study(replace(study, primary=("sw",)))
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(Path(study.test).read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="began with another test"):
        begin_study(replace(study, test=str(copy)))


def test_study_of_random_weights_has_no_base(study: StudySettings, prepared: Prepared, tmp_path: Path) -> None:
    scratch = str(write_recipe(tmp_path / "scratch.yaml", prepared.shards, prepared.tokenizer))
    for changes, message in (
        ({}, "--model: is missing; .*recipe.yaml does not build a model but loads .*/model"),
        ({"recipe": scratch, "variants": ("sft", "words")}, "--model: is missing; the variant words has"),
    ):
        with pytest.raises(UserError, match=message):
            begin_study(replace(study, model=None, **changes))
    begun = begin_study(replace(study, model=None, recipe=scratch))
    jobs = {job.name: job for job in plan_jobs(begun)}
    assert "evaluate-base" not in jobs and not (begun.root / "base").exists()
    assert "--model.path" not in jobs["train-sft-seed1"].arguments
    assert jobs["prepare-records"].variables["TOKENIZER"] == str(prepared.tokenizer)
    runs = [str(begun.run(name, 1)) for name in ("sft", "shuffled_pairs")]
    command = report_command(begun)
    assert command[command.index("--run") + 1 : command.index("--output")] == runs


def test_study_refuses_bad_settings(study: StudySettings, with_trials: StudySettings, tmp_path: Path) -> None:
    no_gold = tmp_path / "no_gold.jsonl"
    no_gold.write_text('{"pair_id": "d", "lang": "en", "question": "1 + 1?"}\n')
    for changes, message in (
        ({"variants": ("sft", "magic")}, "--variants: no variant 'magic'"),
        ({"variants": ("solar",)}, "must include the baseline sft"),
        ({"model": "none"}, "none: no model there"),
        ({"train": ("none.jsonl",)}, r"none\.jsonl: no such file"),
        ({"dev": study.test}, "questions are in .* too; settings must be chosen on others"),
        ({"primary": ("sw", "am")}, "no records in am, which --primary names"),
        ({"dev": with_trials.dev, "primary": ("th",)}, r"dev\.jsonl: no records in th, which --primary names"),
        ({"primary": ("mean", "sw")}, "--primary: give either mean or languages"),
        ({"dev": str(no_gold)}, r"no_gold\.jsonl row 1: `gold` is missing"),
        ({"dev": with_trials.dev, "seeds": (3,)}, "--seeds: 3 is the seed of the trials"),
    ):
        with pytest.raises(UserError, match=message):
            begin_study(replace(study, **changes))
        assert not Path(study.output).exists()
    with pytest.raises(UserError, match=r"no study\.json"):
        read_study(study.root)
    assert yaml.safe_load(Path(study.recipe).read_text())["seed"] == 3

"""`slurm/experiment.sh`: the jobs of a study, with substitutes for Slurm's commands."""

import json
from pathlib import Path

from tests.runs import ROOT
from tests.slurm_commands import run, write_command


def write_study_inputs(folder: Path) -> dict[str, str]:
    """Write the files of a study, almost empty, and return the variables of slurm/experiment.sh."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    for name in ("train", "dev", "test"):
        records = [{"pair_id": name, "lang": lang, "question": name, "gold": "1"} for lang in ("en", "sw", "te")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = f"{ROOT}/pipeline/recipes/qwen2.5-0.5b.yaml"
    files = {"MODEL": "model", "RECIPE": recipe, "INPUT": "train.jsonl", "DATA": "test.jsonl"}
    return {**files, "OUTPUT": "study", "SEEDS": "1 2"}


def test_experiment_submits_trials_choice_and_seeds(tmp_path: Path) -> None:
    variables = write_study_inputs(tmp_path) | {"DEV": "dev.jsonl", "ARMS": "sft shuffled_pairs", "PRIMARY": "sw te"}
    variables |= {"TRAIN_ARGS": "--training.max_steps 4", "TRAIN_FLAGS": "--nodes=2"}
    result = run(tmp_path, "bash slurm/experiment.sh", **variables)
    assert result.returncode == 0, result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines()]
    trials, final = 2 * 3, 2 * 2
    assert names[:3] == ["prepare", "prepare", "evaluate"] and names[-1] == "compare"
    assert (names.count("train"), names.count("evaluate")) == (trials + final, trials + final + 1)
    lines = (tmp_path / "submitted").read_text().splitlines()
    ids = {line.partition("--job-name=")[2].split()[0]: str(101 + i) for i, line in enumerate(lines)}
    jobs = dict(zip(ids, lines, strict=True))

    def after(name: str) -> set[str]:
        return set(jobs[name].partition("--dependency=afterok:")[2].split()[0].split(":"))

    trial = jobs["train-shuffled_pairs-trial2"]
    assert "--nodes=2" in trial and "--training.max_steps 4" in trial and "--loss.alignment_weight 0.3" in trial
    assert after("train-shuffled_pairs-trial2") == {ids["prepare-shuffled_pairs"]}
    assert "RUN=study/shuffled_pairs-trial2 DATA=dev.jsonl" in jobs["evaluate-shuffled_pairs-trial2"]
    assert after("choose") == {ids[f"evaluate-{v}-trial{n}"] for v in ("sft", "shuffled_pairs") for n in (1, 2, 3)}
    assert after("train-sft-seed2") == {ids["prepare-records"], ids["choose"]}
    assert "--seed 2 | " in jobs["train-sft-seed2"] and "CHOICE=study/choices/sft.args" in jobs["train-sft-seed2"]
    assert "RUN=study/sft-seed2 DATA=test.jsonl" in jobs["evaluate-sft-seed2"]
    assert "DERIVE=shuffled_pairs" in jobs["prepare-shuffled_pairs"]
    assert len(after("compare")) == final + 1 and "slurm/compare.sh" in jobs["compare"]
    assert json.loads((tmp_path / "study" / "study.json").read_text())["primary"] == ["sw", "te"]


def test_experiment_cancels_submitted_jobs_if_one_is_refused(tmp_path: Path) -> None:
    variables = write_study_inputs(tmp_path) | {"ARMS": "sft", "SEEDS": "1"}
    result = run(tmp_path, "bash slurm/experiment.sh", REFUSED="train", **variables)
    assert result.returncode == 1 and "cancelled 101 102" in result.stderr
    assert (tmp_path / "cancelled").read_text() == "101 102\n"
    result = run(tmp_path, "bash slurm/experiment.sh", **variables | {"ARMS": "magic"})
    assert result.returncode == 2 and "error: --variants: no variant 'magic'" in result.stderr


def test_experiment_without_remaining_jobs_names_results(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/bash\n")  # lists no jobs
    (tmp_path / "bin" / "python").chmod(0o755)
    result = run(tmp_path, "bash slurm/experiment.sh", **write_study_inputs(tmp_path))
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "all jobs have succeeded; the results are in study/results.md" in result.stderr


def test_experiment_jobs_do_not_inherit_variables_of_other_jobs(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    job = 'job train one "" RUN=runs/one CHOICE=choices/one.args; job evaluate two "" RUN=runs/two'
    write_command(tmp_path, "python", f"echo '{job}'")
    write_command(tmp_path, "sbatch", 'echo "$RUN ${CHOICE:-} ${DERIVE:-}" >>jobs; echo 1')
    names = ["MODEL", "RECIPE", "INPUT", "DATA", "OUTPUT", "CHOICE", "DERIVE", "RUN"]
    result = run(tmp_path, "bash slurm/experiment.sh", **dict.fromkeys(names, "x"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "jobs").read_text().splitlines() == ["runs/one choices/one.args ", "runs/two  "]

"""Which settings may change when a study is continued, and which results forbid it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.study.continuation import is_trained
from pipeline.study.plan import begin_study, plan_jobs
from pipeline.study.settings import StudySettings, read_study


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def events(*statuses: int | None) -> str:
    """Return a starts.jsonl: each start has ended with a status, or was killed (None)."""
    lines = []
    for status in statuses:
        lines += [{"event": "start"}, *([] if status is None else [{"event": "end", "status": status}])]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize("name", ["prepare_args", "train_args", "evaluate_args"])
def test_arguments_change_after_a_job_that_failed(name: str, study: StudySettings) -> None:
    begin_study(study)
    write(study.run("sft", 1) / "starts.jsonl", events(None, None))  # out of memory in the first step
    write(study.root / "shards-records.partial" / "settings.json")
    write(study.root / "base" / "generations.partial" / "facts.json")
    changed = begin_study(replace(study, **{name: "--training.save_steps 7"}))
    assert read_study(study.root) == changed and asdict(changed)[name] == "--training.save_steps 7"
    kind = name.removesuffix("_args")
    assert all("--training.save_steps" in job.arguments for job in plan_jobs(changed) if job.kind == kind)


@pytest.mark.parametrize(
    ("name", "files", "removed"),
    [
        ("evaluate_args", {"base/evaluation.json": "", "sft-trial2/evaluation.json": ""}, None),
        ("evaluate_args", {"choices/choices.json": ""}, ["choices"]),
        ("train_args", {"sft-seed1/starts.jsonl": events(None, 0)}, ["sft-seed1"]),
        ("train_args", {"sft-seed2/checkpoint-500/COMPLETE": "", "sft-trial1/evaluation.json": ""},
         ["sft-seed2", "sft-trial1"]),
        ("train_args", {"choices/choices.json": ""}, ["choices"]),
        ("prepare_args", {"shards-records/manifest.json": "", "weights.safetensors": ""},
         ["shards-records", "weights.safetensors"]),
        ("prepare_args", {"sft-seed1/starts.jsonl": events(0)}, ["sft-seed1"]),
    ],
)  # fmt: skip
def test_arguments_of_results_do_not_change(
    name: str, files: dict[str, str], removed: list[str] | None, study: StudySettings
) -> None:
    begin_study(study)
    for path, text in files.items():
        write(study.root / path, text)
    with pytest.raises(UserError) as error:
        begin_study(replace(study, **{name: "--training.save_steps 7"}))
    begun, message = asdict(study)[name], str(error.value)
    assert f"study.json: the study began with another {name} ({begun!r}, now '--training.save_steps 7')" in message
    listed = [f"{study.root}/{path}" for path in removed or files]
    assert message.endswith(f"or remove what was made with it: {' '.join(listed)}")
    assert read_study(study.root) == study
    begin_study(study)


def test_arguments_change_if_other_jobs_are_done(study: StudySettings) -> None:
    begin_study(study)
    write(study.root / "shards-records" / "manifest.json")
    write(study.root / "base" / "evaluation.json")
    begin_study(replace(study, train_args="--training.max_steps 4"))
    write(study.run("sft", 1) / "starts.jsonl", events(0))
    (study.root / "base" / "evaluation.json").unlink()
    changed = begin_study(replace(study, train_args="--training.max_steps 4", evaluate_args="--batch_size 8"))
    assert read_study(study.root) == changed and changed.evaluate_args == "--batch_size 8"


def test_output_is_the_same_with_a_slash(study: StudySettings) -> None:
    begin_study(study)
    again = begin_study(replace(study, output=study.output + "/"))
    assert [job.name for job in plan_jobs(again)] == [job.name for job in plan_jobs(study)]


def test_run_is_trained_once_its_last_start_has_ended_well(tmp_path: Path) -> None:
    for statuses, expected in (((), False), ((None,), False), ((75, 0), True), ((0, None), False), ((0, 1), False)):
        write(tmp_path / "starts.jsonl", events(*statuses))
        assert is_trained(tmp_path) == expected, statuses

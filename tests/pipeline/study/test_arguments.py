"""Arguments of a study reach its programs unchanged: on this machine, and through the shell scripts for Slurm."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.study.__main__ import print_jobs
from pipeline.study.local import job_commands
from pipeline.study.plan import begin_study, plan_jobs
from pipeline.study.settings import StudySettings
from tests.runs import ENVIRONMENT, ROOT

JSON = '{"enable_thinking":false}'
# A job number for each call. The words of each are a line of the file `submitted`.
SBATCH = '#!/bin/bash\nprintf "%s\\t" "$@" >>submitted; echo >>submitted; wc -l <submitted\n'


@pytest.fixture
def with_json(study: StudySettings) -> StudySettings:
    kwargs = f"--chat_template_kwargs {JSON}"
    return replace(
        study,
        prepare_args=f"--max_seq_length 512 {kwargs}",
        train_args='--data.language_weights\n{"sw":2}  --training.copy_checkpoints_to it\'s',
        evaluate_args=f"--limit 2 {kwargs}",
    )


def expected_arguments(kind: str) -> list[str]:
    return {
        "prepare": ["--max_seq_length", "512", "--chat_template_kwargs", JSON],
        "train": ["--data.language_weights", '{"sw":2}', "--training.copy_checkpoints_to", "it's"],
        "evaluate": ["--limit", "2", "--chat_template_kwargs", JSON],
    }[kind]


def contains(words: list[str], part: list[str]) -> bool:
    return any(words[i : i + len(part)] == part for i in range(len(words)))


def test_arguments_on_this_machine(with_json: StudySettings) -> None:
    study = begin_study(with_json)
    for job in plan_jobs(study):
        if job.kind in ("prepare", "train", "evaluate"):
            *_, command = job_commands(job, study, ranks=1)
            assert contains(command, expected_arguments(job.kind)), command


def test_printed_jobs(with_json: StudySettings, capsys: pytest.CaptureFixture[str]) -> None:
    print_jobs(begin_study(with_json))
    calls = [shlex.split(call) for call in capsys.readouterr().out.splitlines()]
    assert f"PREPARE_ARGS=--max_seq_length 512 --chat_template_kwargs {JSON}" in calls[0]


def test_arguments_through_the_slurm_scripts(with_json: StudySettings, tmp_path: Path) -> None:
    study = with_json
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    for name in ("slurm", "pipeline", "data_prep", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert study.model
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MODEL": study.model, "RECIPE": study.recipe,
        "INPUT": " ".join(study.train), "DATA": study.test, "OUTPUT": study.output, "ARMS": "sft", "SEEDS": "1",
        "PREPARE_ARGS": study.prepare_args, "TRAIN_ARGS": study.train_args, "EVALUATE_ARGS": study.evaluate_args,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "slurm/experiment.sh"], cwd=tmp_path, env=ENVIRONMENT | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    submitted = [line.split("\t") for line in (tmp_path / "submitted").read_text().splitlines()]
    for kind in ("prepare", "train", "evaluate"):
        (words, *_) = [words for words in submitted if f"slurm/{kind}.sh" in words]
        assert contains(words, expected_arguments(kind)), words


def test_paths_that_the_jobs_would_split_are_refused(study: StudySettings, tmp_path: Path) -> None:
    train, model = tmp_path / "my train.jsonl", tmp_path / "my model"
    train.write_bytes(Path(study.train[0]).read_bytes())
    model.symlink_to(str(study.model))
    for changes, option in (
        ({"train": (*study.train, str(train))}, f"--train: '{train}'"),
        ({"output": f"{study.output}\t2"}, "--output: '.*2'"),
        ({"model": str(model)}, f"--model: '{model}'"),
    ):
        with pytest.raises(UserError, match=f"^{option} has whitespace, .*; rename it$"):
            begin_study(replace(study, **changes))
    assert not Path(study.output).exists()

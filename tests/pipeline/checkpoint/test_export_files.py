"""Temporary directories of exports, and their code."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.export
from pipeline.checkpoint import export_files, layout
from pipeline.checkpoint.export_config import write_config
from pipeline.checkpoint.export_files import ABANDONED_SECONDS, remove_abandoned
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.config.settings import Config, ModelSettings
from pipeline.export import export
from tests.model_code import write_model_with_code
from tests.runs import TINY


def test_remove_abandoned_keeps_exports_that_are_being_written(tmp_path: Path) -> None:
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for name, ages in {"killed": [long_ago, long_ago], "running": [long_ago, time.time()]}.items():
        partial = tmp_path / f".hf.{name}.partial"
        partial.mkdir()
        for number, age in enumerate(ages):
            (partial / f"part-{number}").touch()
            os.utime(partial / f"part-{number}", (age, age))
        os.utime(partial, (long_ago, long_ago))
    (tmp_path / ".other.killed.partial").mkdir()
    os.utime(tmp_path / ".other.killed.partial", (long_ago, long_ago))
    remove_abandoned(tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == [".hf.running.partial", ".other.killed.partial"]


@pytest.mark.parametrize("trust", [False, True], ids=["code of transformers", "code of the repository"])
def test_export_has_the_code_that_its_configuration_names(tmp_path: Path, trust: bool) -> None:
    """Many models that transformers has a class for, such as Phi 3, still name code in their configuration."""
    base, output = tmp_path / "base", tmp_path / "hf"
    write_model_with_code(base)
    write_config(AutoConfig.from_pretrained(base, trust_remote_code=trust), ModelSettings(path=str(base)), output)

    config = AutoConfig.from_pretrained(output, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == ("OwnForCausalLM" if trust else "Qwen2ForCausalLM")
    assert sorted(path.suffix for path in output.iterdir()) == [".json", *[".py"] * (2 if trust else 0)]


def test_export_of_a_new_model_names_its_architecture(tmp_path: Path) -> None:
    write_config(AutoConfig.for_model(**TINY), ModelSettings(config=TINY), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def make_checkpoint(source: Path) -> None:
    """Write what is read before the weights."""
    AutoConfig.for_model(**TINY).save_pretrained(source / "model_config")
    (source / "config.yaml").write_text(layout.recipe_yaml(Config()))
    write_json(source / "trainer_state.json", {"step": 5, "vocab_size": 61})
    write_json(source / "COMPLETE", {"id": "5", "files": {}})


def test_restarted_run_replaces_its_unfinished_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a signal stops, or that is killed, leaves a directory of up to the size of the model."""

    class Killed(BaseException):
        """Ends the process."""

    def write_and_end(*arguments: Any) -> None:
        (arguments[-1] / "model.safetensors").touch()
        raise Killed

    make_checkpoint(tmp_path / "run" / "checkpoint-5")
    monkeypatch.setattr(pipeline.export, "write_files", write_and_end)
    for _ in range(2):
        with pytest.raises(Killed):
            export(tmp_path / "run", tmp_path / "run" / "hf", update=True, keep_if_evaluated=True)
    assert len(list((tmp_path / "run").glob(".hf*"))) == 1


def test_export_of_a_checkpoint_that_its_run_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "checkpoint-5"
    make_checkpoint(source)

    def delete_and_write(*arguments: Any) -> None:
        layout.remove_checkpoint(source)
        export_files.write_files(*arguments)

    monkeypatch.setattr(pipeline.export, "write_files", delete_and_write)
    with pytest.raises(UserError, match=r"checkpoint-5: was deleted during the export, .*; export again"):
        export(tmp_path, tmp_path / "hf")
    assert os.listdir(tmp_path) == []

"""An exported checkpoint computes the same loss in Hugging Face transformers as the training engine."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks
from data_prep.shards.format import ShardSet, read_manifest
from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint import layout
from pipeline.checkpoint.export_files import warn_if_tokenizer_differs
from pipeline.checkpoint.export_record import (
    ExportRecord,
    check_not_stale,
    read_export_record,
    replaceable_export,
    write_export_record,
)
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import local_normalizers
from pipeline.evaluation.generation import load_for_generation
from pipeline.export import base_dtype, check_export_target, export
from pipeline.loss import solar_loss_reference
from pipeline.models.fingerprint import model_fingerprint
from pipeline.models.solar_model import decoder_hidden_states
from tests.conftest import Prepared
from tests.pipeline.training.dense_validation import assert_matches_dense, dense_validation
from tests.runs import TINY, losses, metrics, python, refuses, select_rows, train, validations, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_gives_same_loss_as_engine(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
    """The loss of step 2, before its update, is computed again with the weights exported after step 1."""
    own = [601, 604]  # stop tokens of the model itself
    fields = {**TINY, "model_type": "qwen3", "tie_word_embeddings": tied, "vocab_size": 605, "eos_token_id": own}
    changes = {"training__max_steps": 1, "training__warmup_ratio": 0.0, "model__config": fields}
    # Three rows on two ranks: in the second micro-step of a validation, rank 1 has no rows.
    changes["data__eval_shards"] = str(select_rows(prepared.shards, tmp_path / "eval", slice(3)))
    changes |= {"training__metric_for_best_model": "eval_ce", "training__greater_is_better": True}
    changes["training__export_at_end"] = not tied
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", recipe)
    result = python("-m", "pipeline.export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout
    (validation,) = validations(tmp_path / "run")
    expected_metrics = dense_validation(tmp_path / "hf", recipe, tmp_path / "run" / "checkpoint-1")
    assert_matches_dense(validation, expected_metrics)
    if not tied:  # the finished run has exported the same
        assert model_fingerprint(tmp_path / "run" / "hf") == model_fingerprint(tmp_path / "hf")
        _check_model_card(tmp_path / "run" / "hf", metrics(tmp_path / "run")[-1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32  # the precision of the run
    assert model.generation_config.eos_token_id == [load_tokenizer(prepared.tokenizer).eos_token_id, *own]
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 605
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "hf")) == fingerprint(
        load_tokenizer(prepared.tokenizer)
    )
    if not tied:  # the exported tokenizer packs the same shards as the original
        settings = PackSettings(max_seq_length=512)
        manifest = pack([prepared.data], str(tmp_path / "hf"), tmp_path / "again", settings, Ranks())
        assert manifest == read_manifest(prepared.shards)
        file = tmp_path / "hf" / "tokenizer.json"
        file.write_text(file.read_text().replace('"prepend_scheme": "never"', '"prepend_scheme": "always"'))
        with pytest.raises(UserError, match="differs from the one that packed the model's training data"):
            load_for_generation(tmp_path / "hf", "float32")

    # The engine's loss of step 2, before its update, must equal the loss of the exported weights on the same rows.
    train(2, "--config", recipe, "--training.max_steps", 2)
    expected = _dense_loss_of_second_step(model, load_config(recipe, []), prepared.shards)
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, rel=2e-6)
    if not tied:
        assert getattr(read_export_record(tmp_path / "run" / "hf"), "step", None) == 2  # replaced when resumed
    refuses(python("-m", "pipeline.export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf"), "not empty")
    with pytest.raises(UserError, match=r"hf: stale export of step 1, the run has checkpoint-2; export again"):
        check_not_stale(tmp_path / "hf")
    _check_update(tmp_path / "run", tmp_path / "hf")
    best = export(tmp_path / "run", tmp_path / "best", best=True)  # the cross entropy was greater after step 1
    assert (best.step, best.newest) == (1, False)


def _dense_loss_of_second_step(model: PreTrainedModel, config: Config, shards: Path) -> float:
    """Compute the loss of the rows of step 2 by the reference."""
    loader = Loader(ShardSet.open(shards), BatchSplit(4, 1, 0, 1), config.seed, 0, None)
    loader.next()
    micro_batches = loader.next()
    normalizers, total = local_normalizers(micro_batches), 0.0
    for batch in micro_batches:
        hidden = decoder_hidden_states(model, model.get_input_embeddings()(batch.input_ids), batch)
        loss, *_ = solar_loss_reference(
            hidden.flatten(0, 1)[batch.positions],
            model.get_output_embeddings().weight,
            model.get_input_embeddings().weight,
            batch.loss_batch,
            config.loss,
            1.0,
            normalizers,
        )
        total += float(loss.detach())
    return total


def _check_model_card(directory: Path, last: dict[str, Any]) -> None:
    card = ModelCard.load(directory / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert {"en", "sw"} < set(card.data.language) and "solar" in card.data.tags
    figure = f"| ce_loss | {last['ce_loss']:.6g} |"
    for text in (figure, "`data.shards` | `", "  learning_rate: 0.003", "stored in fp32"):
        assert text in card.text, card.text


def _check_update(run: Path, output: Path) -> None:
    """A stale export is replaced and one that is up to date is kept. The record says which weights it holds."""
    old = read_export_record(output)
    assert old and (old.step, old.dtype, old.run, old.newest) == (1, "fp32", str(run), True)
    _check_kept(run, output, old)
    new = export(run, output, update=True)
    assert new == read_export_record(output) and (new.step, new.checkpoints) == (2, "../run")
    assert new.checkpoint == json.loads((run / "checkpoint-2" / "COMPLETE").read_text())["id"] != old.checkpoint
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert export(run, output, update=True) == new
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    export(run, output, "bf16", update=True)
    assert export(run, output, update=True).dtype == "bf16"  # the data type that was asked for before
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    _check_origin(run, output)
    (output / "evaluation.json").touch()
    with pytest.raises(UserError, match=r"did not write \(evaluation.json\)"):
        export(run, output, "fp32", update=True)
    (output / "export.json").unlink()
    assert export(run, output, update=True) is None  # kept, because it is newer than the checkpoint
    os.utime(output / "model.safetensors", (0, 0))
    with pytest.raises(UserError, match=r"has no export.json and is not newer than .*checkpoint-2; if it is an export"):
        export(run, output, update=True)


def _check_kept(run: Path, output: Path, record: ExportRecord) -> None:
    """An export of a named checkpoint is kept, and at the end of a run one that an evaluation has begun with."""
    named = run.with_name("named")
    export(run / "checkpoint-1", named)
    kept = export(run, named, update=True)
    assert kept == read_export_record(named) and (kept.step, kept.newest) == (1, False)

    log = output.parent / "generations.partial"
    log.mkdir()
    logged = dataclasses.asdict(record)
    for file, content in (("loading.json", logged), ("facts.json", {"model": {"export": logged}})):
        write_json(log / file, content)
        assert export(run, output, update=True, keep_if_evaluated=True) == record == read_export_record(output)
        (log / file).unlink()
    log.rmdir()

    own = shutil.copytree(run / "checkpoint-2", run.parent / "own" / "checkpoint-2")
    fields = json.loads((own / "model_config" / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    write_own_config(own / "model_config", **fields | {"model_type": "own", "auto_map": auto_map, "dtype": "bfloat16"})
    recipe = own / "config.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    marker = json.loads((own / "COMPLETE").read_text())
    write_json(own / "COMPLETE", marker | {"files": {name: (own / name).stat().st_size for name in marker["files"]}})
    exported = export(own, run.parent / "own" / "hf")
    assert exported and (exported.step, exported.dtype) == (2, "bf16")  # the run's precision is fp32
    assert (run.parent / "own" / "hf" / "configuration_own.py").is_file()


def _check_origin(run: Path, output: Path) -> None:
    """A run is recognized by its id, or by its directory if an earlier version wrote the checkpoint or the export."""
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in output.iterdir()} == {0o666 & ~umask}
    record = read_export_record(output)
    assert record is not None
    ids = {layout.read_state(path)["run_id"] for path in layout.list_checkpoints(run)}
    assert len(layout.list_checkpoints(run)) == 2 and ids == {record.run_id} and record.run_id
    written = (output / "model.safetensors").stat().st_mtime_ns
    moved = shutil.copytree(run, run.with_name("moved"))
    assert export(moved, output, update=True) == dataclasses.replace(record, checkpoints="../moved")
    write_export_record(output, dataclasses.replace(record, run_id=""))
    assert export(run, output, update=True) == record == read_export_record(output)
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    for changes, message in (
        ({"run_id": "other", "run": "runs/x"}, r"hf: an export of another run \(runs/x\)"),
        ({"run_id": "", "checkpoints": "../other"}, "hf: an export by an earlier version, of a run in .*/other; "),
    ):
        write_export_record(output, dataclasses.replace(record, **changes))
        with pytest.raises(UserError, match=message):
            export(run, output, update=True)
    write_export_record(output, record)


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_export_default_dtype_is_that_of_base(tmp_path: Path, dtype: str | None) -> None:
    AutoConfig.for_model(**TINY, dtype=dtype).save_pretrained(tmp_path / "model_config")
    assert base_dtype(tmp_path) == ("bf16" if dtype else None)


@pytest.mark.parametrize(("trust", "dtype"), [(True, "bf16"), (False, None)])
def test_base_dtype_with_code_of_repository(tmp_path: Path, trust: bool, dtype: str | None) -> None:
    write_own_config(tmp_path / "model_config", dtype="bfloat16")
    if trust:
        assert base_dtype(tmp_path, trust) == dtype
    else:
        with pytest.raises(UserError, match="model_config: unreadable"):
            base_dtype(tmp_path, trust)


def write_own_config(directory: Path, **changes: Any) -> None:
    """Write the configuration of a model type whose code is in the directory."""
    directory.mkdir(exist_ok=True)
    code = "from transformers import Qwen3Config\nclass OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
    (directory / "configuration_own.py").write_text(code)
    fields = {**TINY, "model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}} | changes
    (directory / "config.json").write_text(json.dumps(fields))


def test_tokenizer_of_export_that_cannot_be_loaded_is_warning(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared.tokenizer, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    warn_if_tokenizer_differs(prepared.tokenizer, tmp_path / "hf")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {tmp_path}/hf: AutoTokenizer cannot load the tokenizer (")


def test_check_export_target_keeps_other_models(tmp_path: Path) -> None:
    config, output = Config(output_dir=str(tmp_path)), tmp_path / "hf"
    refused = r"hf: not an export of this run.*training.export_at_end"
    check_export_target(config, 12)
    output.mkdir()
    check_export_target(config, 12)
    (output / "model.safetensors").touch()
    with pytest.raises(UserError, match=refused):
        check_export_target(config, 12)

    record = ExportRecord("runs/x", 6, "id of 6", "fp32", "..", newest=True, run_id="this")
    write_export_record(output, record)
    with pytest.raises(UserError, match=refused):  # a new run
        check_export_target(config, 12)
    write_checkpoint(tmp_path, 6, "this")
    check_export_target(config, 12)
    (output / "evaluation.json").touch()
    with pytest.raises(UserError, match=r"did not write \(evaluation.json\)"):
        check_export_target(config, 12)
    check_export_target(config, 6)  # finished and up to date, so it is not replaced
    write_export_record(output, dataclasses.replace(record, newest=False))
    check_export_target(config, 12)  # of a named checkpoint, so it is not replaced
    write_export_record(output, dataclasses.replace(record, run_id="other"))
    with pytest.raises(UserError, match=refused):
        check_export_target(config, 12)


def test_export_refuses_file_as_output(tmp_path: Path) -> None:
    record = ExportRecord("runs/x", 6, "id of 6", "fp32", "..", newest=True)
    (tmp_path / "hf").touch()
    with pytest.raises(UserError, match="hf: is a file; give a directory with --output"):
        replaceable_export(tmp_path / "hf", tmp_path, record, update=True)
    with pytest.raises(UserError, match="hf: not an export of this run"):
        check_export_target(Config(output_dir=str(tmp_path)), 12)


def write_checkpoint(run: Path, step: int, run_id: str) -> None:
    """Write the files of a checkpoint that are read before training."""
    path = run / f"checkpoint-{step}"
    for folder in ("model_config", "tokenizer"):
        (path / folder).mkdir(parents=True)
    write_json(path / "trainer_state.json", {"step": step, "run_id": run_id})
    write_json(path / "COMPLETE", {"id": f"id of {step}", "files": {}})


def test_export_without_checkpoint(tmp_path: Path) -> None:
    result = python("-m", "pipeline.export", "--checkpoint", tmp_path, "--output", tmp_path / "hf")
    refuses(result, "not a complete checkpoint")
    with pytest.raises(UserError, match="none: no such directory; give the output_dir of a run"):
        export(tmp_path / "none", tmp_path / "hf")
    with pytest.raises(UserError, match=r"no best checkpoint; .* training\.metric_for_best_model"):
        export(tmp_path, tmp_path / "hf", best=True)
    assert not (tmp_path / "hf").exists()

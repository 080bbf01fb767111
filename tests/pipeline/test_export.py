"""An exported checkpoint computes the same loss in Hugging Face transformers as the training engine."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks
from data_prep.shards.format import ShardSet, read_manifest
from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint.export_record import check_not_stale, read_export_record
from pipeline.common.errors import UserError
from pipeline.config.recipe import load_config
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import local_normalizers
from pipeline.evaluation.generation import load_for_generation
from pipeline.export import export, file_tensors
from pipeline.loss import solar_loss_reference
from pipeline.models.solar_model import decode
from tests.conftest import Prepared
from tests.runs import TINY, losses, python, refuses, train, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_gives_same_loss_as_engine(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
    """The loss of step 2, before its update, is computed again with the weights exported after step 1."""
    own = [601, 604]  # stop tokens of the model itself
    fields = {**TINY, "model_type": "qwen3", "tie_word_embeddings": tied, "vocab_size": 605, "eos_token_id": own}
    changes = {"training__max_steps": 1, "training__warmup_ratio": 0.0, "model__config": fields}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", recipe)
    result = python("-m", "pipeline.export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout
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
    config = load_config(recipe, [])
    loader = Loader(ShardSet.open(prepared.shards), BatchSplit(4, 1, 0, 1), config.seed, 0, None)
    loader.next()
    micro_batches = loader.next()
    normalizers, expected = local_normalizers(micro_batches), 0.0
    for batch in micro_batches:
        hidden = decode(model, model.get_input_embeddings()(batch.input_ids), batch)
        expected += float(
            solar_loss_reference(
                hidden.flatten(0, 1)[batch.positions],
                model.get_output_embeddings().weight,
                model.get_input_embeddings().weight,
                batch.loss_batch,
                config.loss,
                1.0,
                normalizers,
            )[0].detach()
        )
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, rel=2e-6)
    refuses(python("-m", "pipeline.export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf"), "not empty")
    with pytest.raises(UserError, match=r"hf: stale export of step 1, the run has checkpoint-2; export again"):
        check_not_stale(tmp_path / "hf")
    _check_update(tmp_path / "run", tmp_path / "hf")


def _check_update(run: Path, output: Path) -> None:
    """A stale export is replaced and one that is up to date is kept. The record says which weights it holds."""
    old = read_export_record(output)
    assert old and (old.step, old.dtype, old.run, old.newest) == (1, "fp32", str(run), True)
    new = export(run, output, update=True)
    assert new == read_export_record(output) and (new.step, new.checkpoints) == (2, "../run")
    assert new.checkpoint == json.loads((run / "checkpoint-2" / "COMPLETE").read_text())["id"] != old.checkpoint
    written = (output / "model.safetensors").stat().st_mtime_ns
    assert export(run, output, update=True) == new
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    export(run, output, "bf16", update=True)
    assert export(run, output, update=True).dtype == "bf16"  # the data type that was asked for before
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    (output / "evaluation.json").touch()
    with pytest.raises(UserError, match=r"did not write \(evaluation.json\)"):
        export(run, output, "fp32", update=True)
    (output / "export.json").unlink()
    with pytest.raises(UserError, match="not an export of this run"):
        export(run, output, update=True)


def test_export_without_checkpoint(tmp_path: Path) -> None:
    result = python("-m", "pipeline.export", "--checkpoint", tmp_path, "--output", tmp_path / "hf")
    refuses(result, "not a complete checkpoint")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("family", "expert"), [("qwen3_moe", "mlp.experts.3.up_proj"), ("qwen3", None)])
def test_export_tensors_are_those_of_hub_files(family: str, expert: str | None, tmp_path: Path) -> None:
    """transformers merges the experts when it loads a model; its own files hold them one by one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(**{**TINY, **experts, "vocab_size": 61, "model_type": family})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    parameters = [(name, p.detach()) for name, p in model.named_parameters()]
    tensors = dict(file_tensors(config, parameters))
    assert (expert is not None) == (f"model.layers.1.{expert}.weight" in tensors)
    assert (expert is not None) == (tensors.keys() != dict(parameters).keys())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)

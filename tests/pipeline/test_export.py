"""An exported checkpoint computes the same loss in Hugging Face transformers as the training engine."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.shards.format import ShardSet
from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.config.recipe import load_config
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import local_normalizers
from pipeline.loss import solar_loss_reference
from pipeline.models.solar_model import decode
from tests.conftest import Prepared
from tests.runs import TINY, losses, python, refuses, train, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_gives_same_loss_as_engine(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
    """The loss of step 2, before its update, is computed again with the weights exported after step 1."""
    fields = {**TINY, "model_type": "qwen3", "tie_word_embeddings": tied, "vocab_size": 605}
    changes = {"training__max_steps": 1, "training__warmup_ratio": 0.0, "model__config": fields}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", recipe)
    result = python("-m", "pipeline.export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert model.generation_config.eos_token_id == [load_tokenizer(prepared.tokenizer).eos_token_id]
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 605
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "hf")) == fingerprint(
        load_tokenizer(prepared.tokenizer)
    )

    # The engine's loss of step 2, before its update, must equal the loss of the exported weights on the same rows.
    train(2, "--config", recipe, "--training.max_steps", 2)
    config = load_config(recipe, [])
    loader = Loader(ShardSet.open(prepared.shards), BatchSplit(4, 1, 0, 1), config.seed, 0, None)
    loader.next()
    micro_batches = loader.next()
    normalizers, expected = local_normalizers(micro_batches), 0.0
    for batch in micro_batches:
        hidden = decode(model, model.get_input_embeddings()(batch.input_ids), batch.position_ids)
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


def test_export_without_checkpoint(tmp_path: Path) -> None:
    result = python("-m", "pipeline.export", "--checkpoint", tmp_path, "--output", tmp_path / "hf")
    refuses(result, "not a complete checkpoint")
    assert not (tmp_path / "hf").exists()

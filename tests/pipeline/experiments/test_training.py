"""The experiment's loop is the trainer's: the same losses from the same rows, step by step."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.shards.format import ShardSet
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.config.recipe import load_config
from pipeline.experiments.training import Rows, Run, train
from tests.conftest import Prepared
from tests.runs import TINY, metrics, write_recipe
from tests.runs import train as run_trainer


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_same_losses_as_the_trainer(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer)
    torch.manual_seed(1)
    fields = TINY | {"vocab_size": 600, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.save_pretrained(tmp_path / "model")
    recipe = write_recipe(
        tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, model__config=None,
        model__path=str(tmp_path / "model"), loss__distance="infonce", loss__centring=True,
        training__train_micro_batch_size_per_gpu=4, training__max_steps=6,
    )  # fmt: skip
    run_trainer(1, "--config", recipe)

    config = load_config(recipe, [])
    shards = ShardSet.open(prepared.shards)
    rows = Rows([shards[i] for i in range(len(shards))], shards.manifest["languages"])
    found = train(model, rows, tokenizer.pad_token_id, Run(config.training, config.loss, config.seed))
    expected = metrics(tmp_path / "run")
    # fp32 in another order of sums and two AdamW's: rounding grows by the steps between.
    assert found["ce"] == pytest.approx([m["ce_loss"] for m in expected], rel=2e-5)
    assert found["alignment"] == pytest.approx([m["align_loss"] for m in expected], rel=2e-4)

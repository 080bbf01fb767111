"""Test that the training loop of experiments gives the trainer's losses, step by step."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.shards.format import ShardSet
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.config.recipe import load_config
from pipeline.experiments.training import InMemoryRows, TrainingJob, run_training_job
from tests.conftest import Prepared
from tests.runs import TINY, metrics, write_recipe
from tests.runs import train as run_trainer


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_train_gives_the_trainers_losses(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
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
    rows = InMemoryRows(shards, shards.manifest["languages"])
    job = TrainingJob(config.training, config.loss, config.seed)
    history = run_training_job(model, rows, tokenizer.pad_token_id, job)
    expected = metrics(tmp_path / "run")
    # The order of fp32 sums and the AdamW implementation differ, so rounding errors grow with the steps.
    assert history["ce"] == pytest.approx([m["ce_loss"] for m in expected], rel=2e-5)
    assert history["alignment"] == pytest.approx([m["align_loss"] for m in expected], rel=2e-4)

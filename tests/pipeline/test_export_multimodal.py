"""The text decoder of a multimodal checkpoint is trained and exported in place of the original one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import UserError
from pipeline.config.recipe import load_config
from pipeline.training.preflight import prepare_run
from tests.conftest import Prepared
from tests.pipeline.training.dense_validation import assert_matches_dense, dense_validation
from tests.runs import TINY, python, refuses, select_rows, train, validations, write_recipe

TEXT = {key: value for key, value in TINY.items() if key != "model_type"} | {"sliding_window": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_multimodal_model(path: Path, tokenizer: Path) -> None:
    """Save a Gemma 3 with a vision tower, with random weights, in the files that Google publishes."""
    size = len(load_tokenizer(tokenizer))
    torch.manual_seed(0)
    config = Gemma3Config(text_config={**TEXT, "vocab_size": size}, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text("{}")


@pytest.mark.slow
def test_export_of_multimodal_model_replaces_its_text_decoder(prepared: Prepared, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_multimodal_model(base, prepared.tokenizer)
    save_file({"norm.weight": torch.ones(32)}, base / "consolidated.safetensors")  # as Mistral publishes: not loaded
    recipe = write_recipe(
        tmp_path / "run.yaml",
        prepared.shards,
        prepared.tokenizer,
        model={"path": str(base), "vocab_multiple": 24},
        data__eval_shards=str(select_rows(prepared.shards, tmp_path / "eval", slice(3))),
        training__max_steps=1,
        training__warmup_ratio=0.0,
        training__export_at_end=True,
    )
    train(2, "--config", recipe)
    output = tmp_path / "run" / "hf"

    (validation,) = validations(tmp_path / "run")
    assert_matches_dense(validation, dense_validation(output, recipe, tmp_path / "run" / "checkpoint-1"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(output), Gemma3ForConditionalGeneration)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("language_model.")}
    assert (output / "preprocessor_config.json").is_file()

    (base / "model.safetensors").unlink()
    refuses(
        python("-m", "pipeline.export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "again"),
        f"{base}: its files have no tensor for ",
    )
    assert not (tmp_path / "again").exists()


def test_train_refuses_multimodal_model_that_could_not_be_exported(prepared: Prepared, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_multimodal_model(base, prepared.tokenizer)
    model = {"path": str(base), "vocab_multiple": 24}
    config = load_config(write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, model=model), [])
    prepare_run(config, 0, 1)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{base}: a multimodal model without safetensors files, from which it could"):
        prepare_run(config, 0, 1)

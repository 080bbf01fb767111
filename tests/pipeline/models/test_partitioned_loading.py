"""Load a model into ZeRO-3 partitions: buffers keep their values, files that do not fit config.json are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import Prepared
from tests.runs import TINY, train, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # transformers compares a stored head with the embedding before it ties them, but not if they are partitioned.
        ({}, "says tie_word_embeddings: true, but lm_head.weight and model.embed_tokens.weight differ; set"),
        ({"vocab_size": 640}, "does not fit the weights: model.embed_tokens.weight: copying"),
    ],
    ids=["own head", "other shape"],
)
def test_files_that_do_not_fit_the_configuration_are_refused(
    prepared: Prepared, tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=605)).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | fields
    (base / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, model={"path": str(base)})
    errors = [line for line in train(2, "--config", recipe, expect=2).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{base}: config.json {message}" in errors[0], errors


@pytest.mark.slow
def test_buffers_of_the_files_are_not_rounded(prepared: Prepared, tmp_path: Path) -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    config = AutoConfig.for_model(**{**TINY, **experts, "model_type": "glm4_moe"}, vocab_size=605)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(5 + torch.rand(4) / 100)
    model.save_pretrained(tmp_path / "base")
    recipe = write_recipe(
        tmp_path / "run.yaml",
        prepared.shards,
        prepared.tokenizer,
        model={"path": str(tmp_path / "base")},
        training__max_steps=1,
        training__precision="bf16",
        training__export_at_end=True,
    )
    train(1, "--config", recipe)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "run/hf"))
    assert before[name].dtype == after[name].dtype == torch.float32
    assert torch.equal(before[name], after[name])
    assert after["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16

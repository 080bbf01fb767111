"""Adapters on tiny models: what is trained, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.common.errors import UserError
from pipeline.config.settings import AdapterSettings, ModelSettings
from pipeline.models.adapters import adapted_meta_model, add_adapter
from pipeline.models.loading import load_model_config
from tests.model_code import write_model_with_code
from tests.runs import TINY


def tiny_config(model_type: str = "qwen2", **fields: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**TINY, "model_type": model_type, "vocab_size": 64, **fields})


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "phi"])
def test_adapter_trains_low_rank_matrices_of_all_linear_layers(model_type: str) -> None:
    for train_embeddings in (False, True):
        settings = AdapterSettings(r=4, train_embeddings=train_embeddings)
        model = adapted_meta_model(tiny_config(model_type), settings)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        ends = {name for name in trained if name.startswith(("model.embed_tokens.", "lm_head."))}
        assert bool(ends) == train_embeddings
        assert all("lora_" in name for name in trained - ends)
        plain = AutoModelForCausalLM.from_config(tiny_config(model_type))
        linear = [name for name, module in plain.model.named_modules() if isinstance(module, torch.nn.Linear)]
        assert sorted(trained - ends) == sorted(
            f"model.{name}.lora_{side}.default.weight" for name in linear for side in "AB"
        )


def test_initial_adapter_depends_on_seed_only() -> None:
    config, settings = tiny_config(), AdapterSettings(r=4)
    weights = []
    for seed, draws in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        torch.rand(draws)
        add_adapter(model, settings, seed)
        weights.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


@pytest.mark.parametrize(
    ("model_type", "adapter", "message"),
    [
        ("qwen2", {"target_modules": ("q_proj", "query")}, "no layer 'query'; it has down_proj, gate_proj, k_proj"),
        ("qwen2", {"target_modules": "query"}, "Target modules"),
        ("qwen2", {"target_modules": ("q_proj", "lm_head")}, "includes the LM head, which is a vocabulary shard"),
        ("qwen2", {"target_modules": ("embed_tokens",)}, "includes the input embedding, which is a vocabulary shard"),
        ("qwen2", {"target_modules": ("input_layernorm",)}, "is not supported"),
        ("qwen3_moe", {}, "includes experts, which adapters do not support"),
        ("qwen3_moe", {"use_dora": True}, "includes experts, which adapters do not support"),
        ("qwen3_moe", {"lora_dropout": 0.1}, "includes experts, which adapters do not support"),
    ],
)
def test_unsupported_target_modules_are_refused(model_type: str, adapter: dict[str, Any], message: str) -> None:
    fields = {"num_experts": 4, "moe_intermediate_size": 16} if model_type == "qwen3_moe" else {}
    with pytest.raises(UserError, match=r"^model\.adapter\.target_modules: ") as error:
        adapted_meta_model(tiny_config(model_type, **fields), AdapterSettings(r=4, **adapter))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_adapters_of_multimodal_models_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.adapter is not supported for multimodal models"):
        load_model_config(ModelSettings(path=str(tmp_path), adapter=AdapterSettings(r=4)), 64)


def test_quantized_bases_and_adapters_are_refused_as_models(tmp_path: Path) -> None:
    config = tiny_config().to_dict() | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has quantized weights, .*\(QLoRA is not supported\)"):
        load_model_config(ModelSettings(path=str(tmp_path)), 64)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter; merge it into its base model first"):
        load_model_config(ModelSettings(path=str(tmp_path)), 64)


def test_adapter_of_a_model_with_its_own_code(tmp_path: Path) -> None:
    write_model_with_code(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(UserError, match=r"read that code, then set model\.trust_remote_code"):
        load_model_config(ModelSettings(path=str(tmp_path / "base")), 61)
    settings = ModelSettings(path=str(tmp_path / "base"), trust_remote_code=True)
    model = adapted_meta_model(load_model_config(settings, 61), AdapterSettings(r=4))
    assert type(model).__name__ == "OwnForCausalLM"

"""The self-check admits models that our loss reproduces, and says what differs in others."""

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, PreTrainedConfig

from pipeline.common.errors import UserError
from pipeline.config.settings import ModelSettings
from pipeline.models import self_check, solar_model
from pipeline.models.narrow_model import narrow_model
from pipeline.models.packed_attention import PACKED, packed_attention, sequence_arguments
from pipeline.models.self_check import check_model, find_difference
from tests.runs import ROOT, TINY

WINDOW = {"sliding_window": 100}
MIXED = {"num_hidden_layers": 6, **WINDOW}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 2.1, 2.2], "partial_rotary_factor": 0.75,
}  # fmt: skip

# Structural settings of each family, in tiny models. docs/training.md lists these families.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": WINDOW,
    "ministral": {**MIXED, "rope_parameters": ROPE},
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, **MIXED},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0], "num_hidden_layers": 4},
    "mixtral": {"num_local_experts": 4},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 8, **MIXED},
    "phi": {"head_dim": None, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {"rope_parameters": LONG, "pad_token_id": 0},
    "smollm3": {"num_hidden_layers": 4},
    "olmo2": {},
    "olmo3": {**MIXED, "num_hidden_layers": 4},
    "apertus": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"use_qk_norm": True},
    "cohere2": {**MIXED, "num_hidden_layers": 4},
    "glm4": {},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    fields: dict[str, Any] = {**TINY, "vocab_size": 61, **FAMILIES.get(family, {}), **changes, "model_type": family}
    return AutoConfig.for_model(**{key: value for key, value in fields.items() if value is not None})


@pytest.mark.parametrize("family", FAMILIES)
def test_check_model_admits_family(family: str) -> None:
    state = torch.random.get_rng_state()
    config = tiny_config(family, tie_word_embeddings=len(family) % 2 == 0, dtype="bfloat16")
    before = config.to_dict()
    check_model(config, ModelSettings())
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_oss", {}, "its logits are not reproduced"),  # attention sinks
        ("qwen3_moe", {"output_router_logits": True}, "its own loss is not the cross entropy of its logits"),
        ("stablelm", {"head_dim": None}, "needs the sequence boundaries.*; set model.attn_implementation to sdpa"),
        ("gpt2", {}, "its decoder has no list `layers`"),
    ],
)
def test_check_model_refuses_with_reason(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"model.config: model_type '{family}' is not supported: .*{reason}") as caught:
        check_model(tiny_config(family, **changes), ModelSettings())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("cohere", {"logit_scale": 0.07}),
        ("gemma2", {"softcap": None}),
        ("gemma3_text", {"embed_scale": 1.0}),
        ("phi", {"bias": None}),
    ],
)
def test_check_model_refuses_wrong_head(family: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check.head_config
    for module in (self_check, solar_model):
        monkeypatch.setattr(module, "head_config", lambda model: replace(right(model), **wrong))
    with pytest.raises(UserError, match="its logits are not reproduced"):
        check_model(tiny_config(family), ModelSettings())


def test_check_model_refuses_leak_between_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(batch: Any, implementation: str) -> dict[str, Any]:
        tokens = batch.input_ids.numel()
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        return sequence_arguments(replace(batch, seq_lens=[tokens], cu_seq_lens=ends), implementation)

    monkeypatch.setattr(solar_model, "sequence_arguments", merged)
    with pytest.raises(UserError, match="the logits of a packed sequence are not those of the same sequence alone"):
        check_model(tiny_config("qwen3"), ModelSettings())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_check_model_refuses_mask_that_ignores_positions(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def continuing(model: Any, embeddings: Any, batch: Any, head_exchange: Any) -> Any:
        positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        return solar_model.decoder_hidden_states(model, embeddings, replace(batch, position_ids=positions))

    monkeypatch.setattr(self_check, "decoder_hidden_states", continuing)
    with pytest.raises(UserError, match="the logits of a packed sequence"):
        check_model(tiny_config("llama"), ModelSettings(attn_implementation=attention))


def test_check_model_refuses_wrong_gradient() -> None:
    def detached(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return packed_attention(module, query, key.detach(), value, *args, **kwargs)

    AttentionInterface.register(PACKED, detached)
    try:
        with pytest.raises(UserError, match=r"the gradient of model\.layers\.1\..* is not its own"):
            check_model(tiny_config("llama"), ModelSettings(attn_implementation=PACKED))
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def test_narrow_model_has_all_kinds_of_layers() -> None:
    """The last of six Gemma 3 layers has full attention; Qwen3 MoE may have dense layers."""
    gemma = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    narrow = narrow_model(gemma, "sdpa")
    assert narrow.config.layer_types == ["sliding_attention", "full_attention"]
    assert narrow.config.sliding_window == 4 and narrow.config.head_dim == 256
    experts = narrow_model(tiny_config("qwen3_moe"), "sdpa")
    assert [type(layer.mlp).__name__ for layer in experts.model.layers] == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock"]


def test_check_model_of_large_configuration_is_cheap() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    before = time.process_time()
    assert find_difference(config, PACKED) is None
    assert time.process_time() - before < 4


def test_documentation_lists_families() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (families,) = re.findall(r"tests admit (.*?)\.", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", families) == list(FAMILIES)

"""Model sizes and activations, against transformers' models, model cards, and autograd."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.benchmarks.common import random_batch
from pipeline.common.errors import UserError
from pipeline.config.settings import AdapterSettings
from pipeline.models.adapters import adapted_meta_model
from pipeline.models.packed_attention import PACKED
from pipeline.models.solar_model import decoder_hidden_states
from pipeline.plan.activations import trace_activations
from pipeline.plan.model_facts import model_stats
from tests.pipeline.plan.cases import MODELS, stats_of
from tests.runs import TINY

# From the model cards on the Hugging Face hub.
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_match_model_and_card(name: str) -> None:
    stats = stats_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
    assert stats.parameters == sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert stats.parameters == sum(stats.matrices + stats.vectors)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Llama-3.1-70B"])
def test_activations_match_hand_count(name: str) -> None:
    """Count what transformers' layer saves under flash attention, tensor by tensor, in bytes per token."""
    f = MODELS[name]
    d, i = f["hidden_size"], f["intermediate_size"]
    kv = d // f["num_attention_heads"] * f["num_key_value_heads"]
    norm = 4 * d + 4 + 2 * d + 2 * d  # fp32 input, its inverse deviation, normalized input, product with the weight
    attention = 2 * (d + kv + kv) + 2 * d + 4 * f["num_attention_heads"]  # q, k, v, output, log-sum-exps
    mlp = 4 * 2 * i  # gate, its SiLU, up, their product
    activations = trace_activations(stats_of(name).config, 2, 1024, "bf16", "flash_attention_2")
    assert activations.layer == 2 * 1024 * (2 * norm + attention + mlp)
    assert activations.hidden == 2 * 1024 * 2 * d


def tiny_config(model_type: str, **changes: int) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**TINY, "model_type": model_type, "vocab_size": 64, **changes})


def saved_bytes(model_type: str, layers: int, checkpointing: bool, attention: str) -> int:
    """Count the storages that autograd saves in a forward pass, weights left out."""
    config = tiny_config(model_type, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is reused
        return tensor

    micro_batch = random_batch(64, 2, 64, 32, 0)  # two sequences in each row
    embeddings = torch.randn(2, 64, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(decoder_hidden_states(model, embeddings, micro_batch))
    return sum(sizes.values())


@pytest.mark.parametrize(("model_type", "attention"), [("qwen2", "sdpa"), ("llama", PACKED), ("qwen3", PACKED)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_match_autograd(model_type: str, attention: str, checkpointing: bool) -> None:
    """Compare the bytes that one more layer adds."""
    predicted = trace_activations(tiny_config(model_type), 2, 64, "fp32", attention)
    shallow, deep = (saved_bytes(model_type, layers, checkpointing, attention) for layers in (2, 3))
    measured = deep - shallow
    assert measured == pytest.approx(predicted.saved(3, checkpointing) - predicted.saved(2, checkpointing), rel=0.01)


def test_model_stats_refuses_experts() -> None:
    with pytest.raises(UserError, match="'qwen3_moe': memory and time are predicted for dense decoder layers only"):
        model_stats(tiny_config("qwen3_moe", num_experts=4, moe_intermediate_size=16))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("adapted", [0, 1])
def test_model_stats_of_an_adapter_of_some_layers(adapted: int, use_dora: bool) -> None:
    """The layers that `target_modules` leaves out have the sizes of the plain model, the others those of all-linear."""
    config, every = tiny_config("qwen2"), AdapterSettings(r=2, use_dora=use_dora)
    some = AdapterSettings(r=2, use_dora=use_dora, target_modules=f"model.layers.{adapted}.*proj")
    stats, of_all, plain = model_stats(config, some), model_stats(config, every), model_stats(config)
    assert stats.parameters == sum(p.numel() for p in adapted_meta_model(config, some).parameters())
    assert stats.layers[adapted] == of_all.layers[adapted] and stats.trained[adapted] == of_all.trained[adapted]
    assert stats.layers[1 - adapted] == plain.layers[1 - adapted] and stats.trained[1 - adapted] == ()
    traced = [trace_activations(config, 1, 64, "fp32", PACKED, adapter=s.adapter) for s in (stats, of_all)]
    assert traced[0] == traced[1]

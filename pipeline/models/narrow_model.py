"""Build a narrow model of a given class and configuration, with random weights, for `self_check.py`."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pipeline.models.families import vocabulary_parameter

VOCAB = 61
LOGIT_STD = 4.0  # large enough for a soft cap of 30 to change the logits
MAX_LAYER_KINDS = 8
MAX_PARAMETERS = 100_000_000
# Upper bounds of integer settings. A sliding window is shorter than the sequences of the check, so it has an effect.
BOUNDS = {
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
MLP_WIDTH = 64


def narrow_model(config: PreTrainedConfig, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a narrow float64 model with one decoder layer of each kind, at least two, and random weights.

    Head size, scales, soft caps, norms, biases, and the kinds of layers are those of `config`. The state of torch's
    random generator changes.

    Args:
        config: configuration of the model. It is not changed.
        attention: attention implementation.
        trust_remote_code: whether code of the model's repository may run.

    Raises:
        ValueError: the model has no list of decoder layers, or would not be small.
    """
    narrow = _narrow_config(config)
    # All layers are built because their kinds may depend on their index. Memory that is never written costs nothing.
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            narrow,
            dtype=torch.float32,  # in that of the configuration, constants such as a scale would be rounded
            attn_implementation=attention,
            experts_implementation="eager",  # the others do not support float64
            trust_remote_code=trust_remote_code,
        )
    _keep_one_layer_of_each_kind(model)
    model.tie_weights()
    if (size := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"its narrow model has {size:,} parameters")
    _randomize(model)
    return model.double().eval()


def _narrow_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the configuration with a small vocabulary, hidden size, MLP, and number of heads and experts."""
    narrow = copy.deepcopy(config)
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow_key_value_heads = min(key_value_heads, 2)
    narrow_heads = narrow_key_value_heads * min(heads // key_value_heads, 2)
    changes: dict[str, Any] = {
        # The model's own embedding has no gradient at the padding token, which may be a token of the text as well.
        "pad_token_id": None,
        "num_attention_heads": narrow_heads,
        "num_key_value_heads": narrow_key_value_heads,
        "hidden_size": narrow_heads * head_size // (1 if config.hidden_size == heads * head_size else 2),
    }
    for key, value in config.to_dict().items():
        if type(value) is int:
            if key.startswith("vocab_size"):
                changes[key] = VOCAB
            elif key.endswith("intermediate_size"):
                changes[key] = min(value, MLP_WIDTH)
            elif key in BOUNDS:
                changes[key] = min(value, BOUNDS[key])
    for key, value in changes.items():
        if hasattr(narrow, key):
            setattr(narrow, key, value)
    return narrow


def _keep_one_layer_of_each_kind(model: PreTrainedModel) -> None:
    """Remove the decoder layers that differ from an earlier one in nothing but their index."""
    decoder, config = model.get_decoder(), model.config
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError("its decoder has no list `layers`")
    depth = len(layers)
    first_of_kind: dict[tuple, int] = {}
    for i, layer in enumerate(layers):
        first_of_kind.setdefault(_kind(layer), i)
    kept = sorted(first_of_kind.values())[:MAX_LAYER_KINDS]
    if len(kept) == 1 and depth > 1:
        kept.append(1)
    decoder.layers = nn.ModuleList(layers[i] for i in kept)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def _kind(layer: nn.Module) -> tuple:
    """Return what distinguishes a layer: classes, parameter shapes and scalar attributes of its modules."""
    scalars = (bool, int, float, str, type(None))
    return tuple(
        (
            name,
            type(module).__qualname__,
            tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)),
            tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, scalars) and k != "layer_idx"),
        )
        for name, module in layer.named_modules()
    )


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Draw weights with which every operation changes the logits, including biases, norms and soft caps."""
    vocabulary = [vocabulary_parameter(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if any(parameter is matrix for matrix in vocabulary):
                parameter.normal_(std=LOGIT_STD / parameter.shape[1] ** 0.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(mean=1.0 if name == "weight" else 0.0, std=0.3)  # norms have weights, not biases
        for buffer in module.buffers(recurse=False):
            if not buffer.isfinite().all():  # not initialized without init_weights, such as a router's correction
                buffer.zero_()

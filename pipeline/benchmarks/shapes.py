"""Shapes of published models, to train with random weights without a download."""

from typing import Any

# The fields are those of the models' config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def model_fields(vocab_size: int, hidden_size: int, layers: int, tied: bool) -> dict[str, Any]:
    """Return the configuration fields of a small Qwen2 model."""
    heads = max(1, hidden_size // 64)
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": tied,
    }


def published_fields(name: str, layers: int | None) -> dict[str, Any]:
    """Return the configuration fields of a published model, with fewer layers if requested."""
    fields = {"model_type": "qwen2", **SHAPES[name]}
    return fields if layers is None else fields | {"num_hidden_layers": layers}


def training_flops(fields: dict[str, Any], tokens: int, targets: int, sequence: int) -> float:
    """Count the floating-point operations of forward and backward.

    Three times the forward pass, recomputation not counted: 2 per weight of the layers and the head, and causal
    attention within sequences (Narayanan et al., 2021, appendix). The head is counted at target tokens only.

    Args:
        fields: configuration fields of the model.
        tokens: number of tokens. targets: number of target tokens. sequence: number of tokens of a sequence.
    """
    d, layers = fields["hidden_size"], fields["num_hidden_layers"]
    key_value = d * fields["num_key_value_heads"] // fields["num_attention_heads"]
    weights = layers * (2 * d * d + 2 * d * key_value + 3 * d * fields["intermediate_size"])
    attention = layers * 2 * 2 * d * sequence / 2
    return 3.0 * (tokens * (2 * weights + attention) + targets * 2 * d * fields["vocab_size"])

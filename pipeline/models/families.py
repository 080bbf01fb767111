"""Supported model families, and what each does at its input embedding and LM head. Add new families here.

The loss replaces the model's own head, so it must reproduce every operation between the decoder output and the logits,
and between the embedding matrix and the decoder input. `HeadConfig` lists the supported operations.
tests/pipeline/models compares the loss with the model's own `forward(labels=...)` for every family.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "granite", "cohere")

# Families that scale their logits, with the factor as a function of the model's configuration.
LOGIT_SCALES = {"granite": lambda config: 1 / config.logits_scaling, "cohere": lambda config: config.logit_scale}


@dataclass(frozen=True)
class HeadConfig:
    """Operations of a model around its vocabulary matrices.

    Attributes:
        tied: whether head and input embedding are the same parameter.
        bias: bias of the head, or None.
        logit_scale: factor of the logits.
        softcap: soft cap of the logits, z -> softcap * tanh(z / softcap), or None.
        embed_scale: factor of the input embeddings.
    """

    tied: bool
    bias: nn.Parameter | None
    logit_scale: float
    softcap: float | None
    embed_scale: float


def head_config(model: PreTrainedModel) -> HeadConfig:
    """Return the head configuration of a model from one of `FAMILIES`."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return HeadConfig(
        tied=vocabulary_parameter(head) is vocabulary_parameter(embedding),
        bias=getattr(head, "bias", None),
        logit_scale=LOGIT_SCALES.get(model.config.model_type, lambda config: 1.0)(model.config),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        embed_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
    )


def vocabulary_parameter(module: nn.Module | None) -> nn.Parameter:
    """Return the [V, d] weight of an input embedding or a head."""
    weight = getattr(module, "weight", None)
    assert isinstance(weight, nn.Parameter)
    return weight

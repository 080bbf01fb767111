"""What a model does at its input embedding and LM head.

The loss replaces the model's own head, so it must reproduce every operation between the decoder output and the logits,
and between the embedding matrix and the decoder input. `HeadConfig` lists the supported operations. `self_check.py`
compares the result with the model's own, so a model with another operation, or with another name for its setting, is
refused.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


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
    """Return the head configuration of a model, by the names that transformers uses for the settings."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return HeadConfig(
        tied=vocabulary_parameter(head) is vocabulary_parameter(embedding),
        bias=getattr(head, "bias", None),
        logit_scale=_logit_scale(model.config),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        embed_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
    )


def _logit_scale(config: PreTrainedConfig) -> float:
    """Return the factor of the logits: `logit_scale` (Cohere) or 1 / `logits_scaling` (Granite)."""
    return float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0))


def vocabulary_parameter(module: nn.Module | None) -> nn.Parameter:
    """Return the [V, d] weight of an input embedding or a head."""
    weight = getattr(module, "weight", None)
    assert isinstance(weight, nn.Parameter)
    return weight

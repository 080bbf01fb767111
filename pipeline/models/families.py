"""Supported model families and what each does around its vocabulary. Admit a new family here."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# What a family does to its hidden states after the decoder is known for these; any other might do more.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "granite", "cohere")


# Factor of the logits, where a family has one.
LOGIT_SCALES = {"granite": lambda config: 1 / config.logits_scaling, "cohere": lambda config: config.logit_scale}


def vocabulary_parameter(module: nn.Module | None) -> nn.Parameter:
    """The [V, d] weight of an input embedding or a head."""
    weight = getattr(module, "weight", None)
    assert isinstance(weight, nn.Parameter)
    return weight


@dataclass(frozen=True)
class HeadConfig:
    """What a family does between the decoder's output and the logits, and at the input."""

    tied: bool
    bias: nn.Parameter | None
    logit_scale: float
    softcap: float | None
    embed_scale: float


def head_config(model: PreTrainedModel) -> HeadConfig:
    """Read off a model of one of FAMILIES."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return HeadConfig(
        tied=vocabulary_parameter(head) is vocabulary_parameter(embedding),
        bias=getattr(head, "bias", None),
        logit_scale=LOGIT_SCALES.get(model.config.model_type, lambda config: 1.0)(model.config),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        embed_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
    )

"""Load or build a Hugging Face causal language model, and run it with its vocabulary kept apart.

Shape letters: B rows, N tokens of a row, T supervised positions, V vocabulary, d hidden size.
"""

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.config.settings import ModelSettings
from pipeline.models.families import FAMILIES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model_config(settings: ModelSettings, tokenizer_size: int) -> PreTrainedConfig:
    """The model's configuration, its vocabulary as the model has it (not yet padded).

    Raises:
        UserError: no such model, a bad configuration, a family that is not supported, a vocabulary too small.
    """
    name = settings.path or "model.config"
    try:
        if settings.path is not None:
            config = AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
        else:
            fields = dict(settings.config or {})
            config = AutoConfig.for_model(fields.pop("model_type", ""), **({"vocab_size": tokenizer_size} | fields))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: cannot load the model configuration: {reason}") from error
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{name}: model_type {config.model_type!r} is not supported; its head is not known here "
            f"(supported: {', '.join(FAMILIES)})"
        )
    if config.vocab_size < tokenizer_size:
        raise UserError(
            f"{name}: vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer_size}; "
            "take the tokenizer that belongs to the model"
        )
    return config


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    return math.ceil(vocab_size / multiple) * multiple


def load_model(settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its vocabulary padded to the multiple; under ZeRO-3 where transformers has been told of it."""
    padded = padded_vocab_size(config.vocab_size, settings.vocab_multiple)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attn_implementation}
    try:
        if settings.path is None:
            config.vocab_size = padded
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                settings.path, config=config, trust_remote_code=settings.trust_remote_code, **options
            )
            if padded != config.vocab_size:
                model.resize_token_embeddings(padded, mean_resizing=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{settings.path or 'model.config'}: cannot load: {str(error).splitlines()[0]}") from error
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's shapes without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)

"""Load or build a Hugging Face causal language model, and run it with its vocabulary kept apart.

Shape letters: B rows, N tokens of a row, T supervised positions, V vocabulary, d hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from data_prep.errors import UserError
from pipeline.config import ModelSettings, TrainingSettings
from pipeline.data import MicroBatch
from pipeline.loss import Centres, LossSettings, SolarLoss, Totals, Vocabulary, embedding_lookup, solar_loss

# What a family does to its hidden states after the decoder is known for these; any other might do more.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "granite", "cohere")

# Factor of the logits, where a family has one.
LOGIT_SCALES = {"granite": lambda config: 1 / config.logits_scaling, "cohere": lambda config: config.logit_scale}

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


def vocabulary_parameter(module: nn.Module | None) -> nn.Parameter:
    """The [V, d] weight of an input embedding or a head."""
    weight = getattr(module, "weight", None)
    assert isinstance(weight, nn.Parameter)
    return weight


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's shapes without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adamw_arguments(module: nn.Module, t: TrainingSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups of parameters and options for AdamW: weight decay on matrices, none on vectors. Also under ZeRO-3."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": t.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options = {"lr": t.learning_rate, "betas": (t.adam_beta1, t.adam_beta2), "eps": t.adam_epsilon}
    return [group for group in groups if group["params"]], options


@dataclass(frozen=True)
class HeadFacts:
    """What a family does between the decoder's output and the logits, and at the input."""

    tied: bool
    bias: nn.Parameter | None
    logit_scale: float
    softcap: float | None
    embed_scale: float


def head_facts(model: PreTrainedModel) -> HeadFacts:
    """Read off a model of one of FAMILIES."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return HeadFacts(
        tied=vocabulary_parameter(head) is vocabulary_parameter(embedding),
        bias=getattr(head, "bias", None),
        logit_scale=LOGIT_SCALES.get(model.config.model_type, lambda config: 1.0)(model.config),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        embed_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
    )


class SolarModel(nn.Module):
    """Decoder and loss in one forward pass, as DeepSpeed needs it; the vocabulary comes in as shards."""

    def __init__(self, model: PreTrainedModel, settings: LossSettings, padded_size: int, languages: int) -> None:
        super().__init__()
        self.model, self.settings, self.padded_size, self.languages = model, settings, padded_size, languages
        self.embed_scale = head_facts(model).embed_scale
        self.parts: SolarLoss | None = None

    def forward(
        self,
        batch: MicroBatch,
        vocabulary: Vocabulary,
        alignment_weight: float,
        totals: Totals,
        centres: Centres | None,
        group: dist.ProcessGroup | None,
        grad_factor: float,
    ) -> Tensor:
        """The global loss of this micro-step; its parts stay in `self.parts`. grad_factor: see embedding_lookup."""
        embeddings = embedding_lookup(batch.input_ids, vocabulary.embedding, self.padded_size, group, grad_factor)
        if self.embed_scale != 1:
            embeddings = embeddings * torch.tensor(self.embed_scale, dtype=embeddings.dtype)
        hidden = decode(self.model, embeddings, batch.position_ids)
        selected = hidden.flatten(0, 1).index_select(0, batch.positions)
        self.parts = solar_loss(
            selected,
            batch.supervised,
            vocabulary,
            self.settings,
            alignment_weight,
            totals,
            self.languages,
            centres,
            group,
        )
        return self.parts.loss


def decode(model: PreTrainedModel, embeddings: Tensor, position_ids: Tensor) -> Tensor:
    """[B, N, d] embeddings to [B, N, d] final hidden states; sequences of a row are told apart by their positions."""
    # With a cache, transformers takes no notice of restarting positions and sequences would see each other.
    options = {"use_cache": False}
    if model.config._attn_implementation == "flash_attention_2":
        # Its variable-length kernel takes one long row.
        shape = embeddings.shape
        embeddings, position_ids = embeddings.reshape(1, -1, shape[-1]), position_ids.reshape(1, -1)
        return model.get_decoder()(inputs_embeds=embeddings, position_ids=position_ids, **options)[0].view(shape)
    return model.get_decoder()(inputs_embeds=embeddings, position_ids=position_ids, **options)[0]

"""Load a Hugging Face causal language model, or build one with random weights."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from pipeline.common import distributed
from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional
from pipeline.config.settings import ModelSettings
from pipeline.models.families import head_config
from pipeline.models.multimodal import TEXT_KEY_MAPPING, text_decoder_config, text_name
from pipeline.models.packed_attention import resolve_attention
from pipeline.models.weight_files import file_of_tensors, read_tensor

ADAPTER_CONFIG = "adapter_config.json"  # peft's file name
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model_config(settings: ModelSettings, tokenizer_size: int) -> PreTrainedConfig:
    """Load the model's configuration, or its text decoder's; `vocab_size` is not padded yet.

    `eos_token_id` lists all stop tokens of the model. The generation config often has more of them than config.json,
    and a checkpoint stores this configuration only.

    Args:
        settings: the model section of a recipe.
        tokenizer_size: number of tokens in the tokenizer; the default `vocab_size` when building from `model.config`.

    Raises:
        UserError: the model does not exist, its configuration is invalid, it has no decoder-only text model, its
            attention implementation is not supported, or `model.config` has a smaller vocabulary than the tokenizer.
    """
    name = settings.path or "model.config"
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{name}: is an adapter; merge it into its base model first (pipeline.export --merge)")
    try:
        if settings.path is not None:
            whole = AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
            config = text_decoder_config(whole, name)
            _check_weights(name, whole, settings)
            config.eos_token_id = _stop_tokens_of(settings.path, config)
        else:
            fields = dict(settings.config or {})
            config = AutoConfig.for_model(fields.pop("model_type", ""), **({"vocab_size": tokenizer_size} | fields))
            config = text_decoder_config(config, name)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines()
        reason = " ".join(map(str.strip, lines if isinstance(error, StrictDataclassError) else lines[:1]))
        # transformers lists all model types that it knows.
        reason = reason if len(reason) < 300 else f"{reason[:300]} ..."
        reason = needs_own_code(error, "model.trust_remote_code") or reason
        raise UserError(f"{name}: cannot load the model configuration: {reason}") from error
    if settings.path is None and config.vocab_size < tokenizer_size:
        raise UserError(f"{name}: vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer_size}")
    resolve_attention(settings.attn_implementation, config)  # refuses what cannot run before anything is loaded
    return config


def _check_weights(name: str, config: PreTrainedConfig, settings: ModelSettings) -> None:
    """Check that the weights of a model are not quantized, and that an adapter's base is a text model.

    Raises:
        UserError: they are, or it is not.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{name}: has quantized weights, which ZeRO-3 cannot partition (QLoRA is not supported); use the model "
            "in bf16, whose memory ZeRO-3 divides by the number of GPUs"
        )
    if settings.adapter.r is not None and config.get_text_config() is not config:
        raise UserError(
            f"{name}: model.adapter is not supported for multimodal models; save the text decoder as a model of its own"
        )


def _stop_tokens_of(path: str, config: PreTrainedConfig) -> int | list[int] | None:
    """Return `eos_token_id` of the generation config, or that of the configuration if there is none."""
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has no generation_config.json
        eos = None
    return config.eos_token_id if eos is None else eos


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Round a vocabulary size up to a multiple."""
    return math.ceil(vocab_size / multiple) * multiple


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model, or None if its configuration does not limit them.

    A rotary embedding that is scaled by a factor has that many times its original positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # families with two kinds of attention layers
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return max(positions, int(original * factor)) if positions and original and factor else positions


def load_model(settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load or build the model in training mode, with its vocabulary padded to a multiple of `vocab_multiple`.

    If an `HfDeepSpeedConfig` is alive, transformers partitions the parameters as it creates them (ZeRO-3).

    Raises:
        UserError: the weights cannot be loaded, or the attention implementation or Liger's kernels are not available.
    """
    padded = padded_vocab_size(config.vocab_size, settings.vocab_multiple)
    attention = resolve_attention(settings.attn_implementation, config)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    try:
        if settings.path is None:
            config.vocab_size = padded
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                settings.path,
                config=config,
                trust_remote_code=settings.trust_remote_code,
                key_mapping=TEXT_KEY_MAPPING,
                output_loading_info=True,
                **options,
            )
            _check_complete(settings.path, loading)
            _check_tied_head(settings.path, model)
            _restore_buffers(settings.path, model)
            if padded != config.vocab_size:
                model.resize_token_embeddings(padded, mean_resizing=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{settings.path or 'model.config'}: cannot load: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if (mismatch := re.search("size mismatch for (.*)", str(error))) is None:
            raise
        raise UserError(f"{settings.path}: config.json does not fit the weights: {mismatch[1]}") from error
    if settings.use_liger_kernel:
        _apply_liger_kernel(model)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _check_complete(name: str, loading: dict[str, Any]) -> None:
    """Check that all weights came from the model's files. transformers initializes missing ones at random.

    Args:
        name: the model.
        loading: the loading information of transformers.

    Raises:
        UserError: weights are missing, or have another shape than the configuration requires.
    """
    missing = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{name}: its files lack {len(missing)} weights of the model, or have them in another shape (first: "
            f"{min(missing)}); the architecture in config.json does not fit them"
        )


def _check_tied_head(name: str, model: PreTrainedModel) -> None:
    """Check that the files of a model with tied embeddings have no other LM head. Called on all ranks, runs on rank 0.

    transformers does not tie such a head, except with ZeRO-3, where it cannot compare the partitioned weights.

    Args:
        name: the model.
        model: the model, loaded from its safetensors files.

    Raises:
        UserError: the files have a head that differs from the input embedding.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not (distributed.is_main_process() and head_config(model).tied):
        return
    names = {f"{path}.weight" for path, module in model.named_modules() if any(module is end for end in ends)}
    stored = {key: file for key, file in file_of_tensors(name).items() if text_name(key) in names}
    if len(stored) == 2 and not torch.equal(*(read_tensor(file, key) for key, file in stored.items())):
        raise UserError(
            f"{name}: config.json says tie_word_embeddings: true, but {' and '.join(sorted(stored))} differ; set it to "
            "false in config.json"
        )


def _restore_buffers(name: str, model: PreTrainedModel) -> None:
    """Set the buffers that are in the files of a model to their values there.

    With ZeRO-3, transformers rounds them to the data type of the weights. A router's correction (GLM 4.5, DeepSeek V3)
    would choose other experts.

    Args:
        name: the model.
        model: the model, loaded from its safetensors files.
    """
    stored = model.state_dict().keys()
    buffers = {key: buffer for key, buffer in model.named_buffers() if key in stored}
    for key, file in file_of_tensors(name).items() if buffers else ():
        if (buffer := buffers.get(text_name(key))) is not None:
            buffer.data = read_tensor(file, key).to(buffer.device)


def _apply_liger_kernel(model: PreTrainedModel) -> None:
    """Replace modules of the decoder by Liger's kernels, but leave head and loss as they are."""
    name, family = "model.use_liger_kernel", model.config.model_type
    if distributed.local_device().type != "cuda":
        raise UserError(f"{name}: Liger's kernels need a GPU; set it to false")
    liger = import_optional("liger_kernel.transformers.monkey_patch")
    if family not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"{name}: liger-kernel has no kernels for model_type {family!r}; set it to false")
    config = model.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    expected = ("gelu_pytorch_tanh",) if family.startswith("gemma") else ("silu", "swish")
    if activation not in expected:  # Liger patches the MLP without looking at it
        raise UserError(f"{name}: Liger's MLP has the activation {expected[0]}, not {activation}; set it to false")
    from transformers.integrations.liger import apply_liger_kernel  # also imports peft and accelerate

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device (shapes without weights)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=has_own_code(config))


def needs_own_code(error: Exception, setting: str) -> str | None:
    """Return what to do if transformers failed because it may not run code of a model's repository, or else None."""
    if "trust_remote_code=True" not in str(error):
        return None
    return f"it needs code of its repository; read that code, then set {setting}"


def has_own_code(config: PreTrainedConfig) -> bool:
    """Return whether a configuration was loaded with the code of its repository, which was trusted then."""
    return type(config).__module__.partition(".")[0] != "transformers"

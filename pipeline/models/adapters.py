"""LoRA and DoRA adapters of the decoder, by `peft`.

`peft` replaces linear layers of the model in place, so the model keeps its class. Input embedding and LM head are never
replaced: they stay vocabulary shards, trained as a whole or frozen.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional
from pipeline.config.settings import AdapterSettings
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.loading import ADAPTER_CONFIG, meta_model

EXPERTS = (
    "model.adapter.target_modules: includes experts, which adapters do not support; name other layers, such as "
    "[q_proj, k_proj, v_proj, o_proj]"
)


def lora_config(settings: AdapterSettings, **fields: Any) -> Any:
    """Return the `peft.LoraConfig` of the settings. `fields` are further fields of it."""
    targets = settings.target_modules
    return import_optional("peft").LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
        **fields,
    )


def add_adapter(model: PreTrainedModel, settings: AdapterSettings, seed: int = 0) -> PreTrainedModel:
    """Add the adapter to a model in place, and freeze everything else as the settings say. Without `r`, do nothing.

    The model may be partitioned by ZeRO-3, or on the meta device. The initial weights depend on the seed only, not on
    the rank or the number of ranks. Torch's random state changes.

    Raises:
        UserError: a name in `target_modules` is not that of a linear layer of the decoder, or `target_modules` includes
            experts, the embedding or the head.
    """
    if settings.r is None:
        return model
    peft = import_optional("peft")
    dtype = vocabulary_parameter(model.get_input_embeddings()).dtype
    plain = list(model.get_decoder().named_modules())
    torch.manual_seed(seed)
    try:
        peft.inject_adapter_in_model(lora_config(settings), model)
    except ValueError as error:
        if "ParamWrapper" in str(error):  # peft's layer for experts, which refuses DoRA and dropout
            raise UserError(EXPERTS) from None
        raise UserError(f"model.adapter.target_modules: {str(error).strip().splitlines()[0]}") from None
    adapted = [f".{name}" for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    targets = [] if isinstance(settings.target_modules, str) else settings.target_modules
    if unknown := [target for target in targets if not any(name.endswith(f".{target}") for name in adapted)]:
        linear = (name for name, module in plain if isinstance(module, torch.nn.Linear))
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise UserError(f"model.adapter.target_modules: the model has no layer {unknown[0]!r}; it has {known}")
    if any(isinstance(module, peft.tuners.lora.layer.ParamWrapper) for module in model.modules()):
        raise UserError(EXPERTS)
    ends = {"input embedding": model.get_input_embeddings(), "LM head": model.get_output_embeddings()}
    for name, module in ends.items():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            raise UserError(
                f"model.adapter.target_modules: includes the {name}, which is a vocabulary shard; to train it, set "
                "model.adapter.train_embeddings"
            )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # peft keeps adapters of bf16 models in fp32, DeepSpeed does not
    head = head_config(model)
    for parameter in (*map(vocabulary_parameter, ends.values()), head.bias):
        if parameter is not None:
            parameter.requires_grad_(settings.train_embeddings)
    return model


def load_exported(path: Path | str, dtype: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a Hugging Face model, or the directory of a `peft` adapter into its base model.

    transformers can load adapters too, but with version 5.23 it leaves DoRA's magnitudes at their initial values.

    Raises:
        OSError, ValueError, KeyError: it cannot be loaded.
    """
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    peft = import_optional("peft")
    name = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return peft.PeftModel.from_pretrained(base, path).get_base_model()


def adapted_meta_model(config: PreTrainedConfig, settings: AdapterSettings) -> PreTrainedModel:
    """Build the model on the meta device, with its adapter if there is one. Torch's random state does not change.

    Raises:
        UserError: see `add_adapter`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return add_adapter(meta_model(copy.deepcopy(config)), settings)

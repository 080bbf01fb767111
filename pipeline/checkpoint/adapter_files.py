"""Write a trained adapter for `PeftModel.from_pretrained`, or merge it into its base model."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.checkpoint.export_config import write_config
from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional
from pipeline.config.settings import ModelSettings
from pipeline.models.adapters import lora_config
from pipeline.models.families import head_config
from pipeline.models.fingerprint import base_fingerprint
from pipeline.models.loading import meta_model

PREFIX = "base_model.model."  # of the base model's names in a PeftModel


def write_adapter(
    tensors: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, settings: ModelSettings, directory: Path
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Trained embeddings are among the weights, as `modules_to_save`.

    Args:
        tensors: name and value of each trained parameter.
        config: configuration of the base model.
        settings: the model section of the recipe.
        directory: directory to write to.
    """
    model = meta_model(config)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    tied, fields = head_config(model).tied, {}
    if settings.adapter.train_embeddings:
        saved = [name.rpartition(".")[2] for name in names]
        fields = {"modules_to_save": saved[:1] if tied else saved, "ensure_weight_tying": tied}
    with torch.random.fork_rng(devices=[]):
        model = import_optional("peft").get_peft_model(model, lora_config(settings.adapter, **fields))
    base = str(settings.path)
    model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    state: dict[str, Tensor] = {}
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        if module in names:  # peft stores a tied head, too
            modules = names if tied and leaf == "weight" else [module]
            state |= {f"{PREFIX}{each}.modules_to_save.default.{leaf}": tensor for each in modules}
        else:
            state[PREFIX + name] = tensor
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def write_merged_model(
    tensors: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    settings: ModelSettings,
    state: dict[str, Any],
    directory: Path,
) -> None:
    """Write the base model with the adapter merged into its weights. It takes 4 bytes of host memory per parameter.

    Args:
        tensors: name and value of each trained parameter, in fp32, in which they are merged.
        config: configuration to write, with the data type of the weights.
        settings: the model section of the recipe.
        state: trainer state of the checkpoint.
        directory: directory to write to.

    Raises:
        UserError: the base model cannot be loaded, or has other content than when the adapter was trained.
    """
    name, options = str(settings.path), {"trust_remote_code": settings.trust_remote_code}
    try:
        found = base_fingerprint(name, AutoConfig.from_pretrained(name, **options))
        if found != state["fingerprints"].get("model.path"):
            raise UserError(f"{name}: has other content than when the adapter was trained on it; restore it")
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot load the base model: {str(error).splitlines()[0]}") from error
    with tempfile.TemporaryDirectory(dir=directory) as adapter:
        write_adapter(tensors, config, settings, Path(adapter))
        model = import_optional("peft").PeftModel.from_pretrained(base, adapter).merge_and_unload()
    model.to(config.dtype).save_pretrained(directory)
    write_config(config, settings, directory)

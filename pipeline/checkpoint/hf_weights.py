"""Merge the weights of a checkpoint and write them as Hugging Face safetensors files, one file in memory at a time."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from pipeline.checkpoint import layout
from pipeline.models.loading import meta_model
from pipeline.zero3.safe_loading import weights_only_loading

MAX_FILE_BYTES = 5 * 10**9  # maximum file size, as is usual on the Hugging Face Hub


def merged_tensors(source: Path, state: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor). Vocabulary padding is removed, and a tied head is yielded only once.

    Buffers are not converted to `dtype`: they are more precise than the weights, such as a router's correction.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with (
        weights_only_loading(),
        contextlib.redirect_stdout(io.StringIO()),  # DeepSpeed prints its progress
        contextlib.redirect_stderr(io.StringIO()),
    ):
        state_dict = get_fp32_state_dict_from_zero_checkpoint(str(source), tag=layout.DEEPSPEED_TAG, lazy_mode=True)
    for full_name, partitioned in state_dict.items():
        name = full_name.removeprefix("model.")
        if state["tied"] and name == "lm_head.weight":
            continue
        if isinstance(partitioned, torch.Tensor):  # a buffer
            yield name, partitioned.contiguous()
            continue
        tensor = partitioned.contiguous()  # merges the partitions
        if full_name in state["vocabulary_parameters"]:
            tensor = tensor[: state["vocab_size"]]
        yield name, tensor.to(dtype).contiguous()


def file_tensors(
    config: PreTrainedConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert the tensors of a model to those of its files on the Hub, as (name, tensor).

    They differ for some architectures. For example, transformers merges the experts of a layer when it loads a model.

    Args:
        config: the model's configuration.
        tensors: (name, tensor) of the model's parameters.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # code of the model's repository, which has no conversions
        yield from tensors
        return
    model = meta_model(config)
    for name, tensor in tensors:
        for file_name, part in revert_weight_conversion(model, {name: tensor}).items():
            yield file_name, part.contiguous()


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Write model.safetensors, or several files and an index, with the file names of Hugging Face.

    config.json must exist already.
    """
    files: list[list[str]] = []  # tensor names of each file
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            path = directory / f"part-{len(files)}"
            save_file(pending, path, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read. Give them the mode of any other new file.
            shutil.copymode(directory / "config.json", path)
            files.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > MAX_FILE_BYTES:
            flush()
        pending[name] = tensor
        total += size
    flush()
    if len(files) == 1:
        os.replace(directory / "part-0", directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for i, name in enumerate(names):
        os.replace(directory / f"part-{i}", directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[i] for i, file in enumerate(files) for tensor in file},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

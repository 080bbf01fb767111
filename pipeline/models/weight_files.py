"""The safetensors files of a model, by the rules of transformers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file


def file_of_tensors(path: str) -> dict[str, Path]:
    """Return the safetensors file of each tensor that transformers loads of a model. Empty if it has no such files.

    A directory may have others, such as Mistral's consolidated.safetensors: the same weights by other names.

    Args:
        path: a local directory or an id on the Hub.

    Raises:
        OSError: a file cannot be read.
    """
    options = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **options):
        with safe_open(single, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), Path(single))
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        return {}
    # The index names the tensors of all files, so that no rank opens hundreds of them.
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return {tensor: Path(index).with_name(file) for tensor, file in files.items()}


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Read a tensor of a safetensors file."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)

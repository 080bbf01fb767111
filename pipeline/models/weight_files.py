"""The safetensors files of a model, by the rules of transformers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file


def weight_files(path: str) -> list[Path]:
    """Return the safetensors files that transformers loads a model from. Empty if it has none.

    A directory may have others, such as Mistral's consolidated.safetensors: the same weights by other names.

    Args:
        path: a local directory or an id on the Hub.

    Raises:
        OSError: a file cannot be read.
    """
    options = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **options):
        return [Path(single)]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        return []
    names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return [Path(index).with_name(name) for name in sorted(names)]


def file_of_tensors(path: str) -> dict[str, Path]:
    """Return the file of each tensor of a model, by the tensor's name. See `weight_files`."""
    files: dict[str, Path] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Read a tensor of a safetensors file."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)

"""The text decoder of a multimodal checkpoint, such as Gemma 3 from 4B on.

Only the text decoder is loaded and trained. An export has the files of the whole model, with the trained weights in
place of the decoder's.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from pipeline.common.errors import UserError
from pipeline.models.weight_files import file_of_tensors, read_tensor

# Names of a text decoder's weights in the files of a multimodal model, and in a model of its own, as for the argument
# `key_mapping` of `from_pretrained`. Text models have no such names.
TEXT_KEY_MAPPING = {r"^model\.language_model\.": "model.", r"^language_model\.": ""}
PROCESSOR_FILES = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)

Tensors = Iterator[tuple[str, torch.Tensor]]


def text_decoder_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the configuration of a model's text decoder, which is `config` itself for a text model.

    Raises:
        UserError: the model is not a decoder-only text model and has no text decoder that is a model of its own.
    """
    text = config.get_text_config()
    if text is config and not config.is_encoder_decoder:
        return config
    if config.is_encoder_decoder or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{name}: model_type {config.model_type!r} is not supported: it has no text decoder that transformers "
            "loads as a causal language model of its own"
        )
    text.dtype = text.dtype or config.dtype
    return text


def load_multimodal_config(path: str | None, trust_remote_code: bool) -> PreTrainedConfig | None:
    """Load the configuration of a multimodal model. None if the model at `path` is a text model."""
    if path is None:
        return None
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return None if config.get_text_config() is config else config


def check_weight_files(path: str | None, trust_remote_code: bool) -> None:
    """Check that a local multimodal model has the files from which an export takes its other parts.

    A model on the Hub is not checked, which would download its weights.

    Raises:
        UserError: it has no safetensors files, but for example pytorch_model.bin.
    """
    if path is None or not Path(path).is_dir() or load_multimodal_config(path, trust_remote_code) is None:
        return
    if not file_of_tensors(path):
        raise UserError(
            f"{path}: a multimodal model without safetensors files, from which it could not be exported; load it with "
            "transformers and save it with save_pretrained, which writes them"
        )


def multimodal_tensors(text_tensors: Tensors, path: str, dtype: torch.dtype) -> Tensors:
    """Yield the tensors of a multimodal model's files, with those of its text decoder replaced.

    Args:
        text_tensors: (name, tensor) of the trained text decoder, as a model of its own stores them.
        path: the multimodal model that was trained: a local directory or an id on the Hub.
        dtype: data type of the other floating-point tensors.

    Raises:
        UserError: the multimodal model is not there any more, or has no tensor for one of the text decoder's.
    """
    file_of = file_of_tensors(path)
    original = {text_name(name): name for name in file_of}
    replaced = set()
    for name, tensor in text_tensors:
        if name not in original:
            raise UserError(f"{path}: its files have no tensor for {name}; put back the model that was trained")
        replaced.add(original[name])
        yield original[name], tensor
    replaced.add(original.get("lm_head.weight", ""))  # a tied head may be stored beside the embedding
    for name in sorted(file_of.keys() - replaced):
        tensor = read_tensor(file_of[name], name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def copy_processor_files(path: str, directory: Path) -> None:
    """Copy the files of a multimodal model's processors that exist."""
    for name in PROCESSOR_FILES:
        if (source := model_directory(path) / name).is_file():
            shutil.copyfile(source, directory / name)


def model_directory(path: str) -> Path:
    """Return the local directory of a model, with its processors' files and its code, but not always its weights.

    Raises:
        UserError: it is neither there nor on the Hub.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=[*PROCESSOR_FILES, "*.py"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: export needs the model that was trained: {reason}") from error


def text_name(name: str) -> str:
    """Return the name of a tensor of a multimodal model's files in its text decoder as a model of its own."""
    for pattern, replacement in TEXT_KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name

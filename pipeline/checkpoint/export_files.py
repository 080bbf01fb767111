"""Write the files of an exported model, and replace an older export."""

import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint import layout
from pipeline.checkpoint.adapter_files import write_adapter, write_merged_model
from pipeline.checkpoint.export_config import write_config
from pipeline.checkpoint.export_record import EXPORT_FILE, ExportRecord, write_export_record
from pipeline.checkpoint.hf_weights import file_tensors, merged_tensors, write_weights
from pipeline.checkpoint.model_card import MODEL_CARD
from pipeline.common.errors import UserError, first_line
from pipeline.config.settings import ModelSettings
from pipeline.models.loading import ADAPTER_CONFIG, DTYPES
from pipeline.models.multimodal import PROCESSOR_FILES, copy_processor_files, multimodal_tensors
from pipeline.models.stop_tokens import stop_strings, stop_token_ids

ABANDONED_SECONDS = 24 * 3600  # without a write, after which an unfinished export counts as abandoned


def write_files(
    source: Path, settings: ModelSettings, state: dict[str, Any], record: ExportRecord, directory: Path
) -> None:
    """Write all files of an export, except for the model card.

    Args:
        source: Checkpoint directory.
        settings: The model section of its recipe.
        state: Its trainer state.
        record: Origin of the export.
        directory: Directory to write to.

    Raises:
        UserError: A file of the checkpoint is unreadable.
        OSError: A file cannot be written.
    """
    dtype = DTYPES[record.dtype]
    config = layout.read_model_config(source, settings.trust_remote_code)
    config.vocab_size, config.dtype = state["vocab_size"], dtype
    config.name_or_path = settings.path or ""  # where the code of the model is, if it has some
    if settings.adapter.r is not None:
        trained = merged_tensors(source, state, dtype if record.adapter else torch.float32)
        if record.adapter:
            write_adapter(trained, config, settings, directory)
        else:
            write_merged_model(trained, config, settings, state, directory)
    else:
        _write_model(source, config, settings, state, directory)
    shutil.copytree(source / "tokenizer", directory, dirs_exist_ok=True)
    # Inference engines such as vLLM read stop tokens from the generation config. The end-of-turn token of the chat
    # template is one of them, and may differ from the model's own.
    tokenizer = load_tokenizer(source / "tokenizer")
    stop_tokens = stop_token_ids(config.eos_token_id, tokenizer)
    generation = GenerationConfig(
        eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id, stop_strings=stop_strings(tokenizer)
    )
    generation.save_pretrained(directory)
    write_export_record(directory, record)


def _write_model(
    source: Path, config: PreTrainedConfig, settings: ModelSettings, state: dict[str, Any], directory: Path
) -> None:
    """Write the configuration and weights of a model of which all weights were trained.

    The other parts of a multimodal model are those that it had before.
    """
    tensors = file_tensors(config, merged_tensors(source, state, config.dtype))
    if (source / "multimodal_config").exists():
        assert settings.path is not None  # otherwise it is a text model
        whole = layout.read_model_config(source, settings.trust_remote_code, "multimodal_config")
        whole.dtype = config.dtype
        write_config(whole, settings, directory)
        copy_processor_files(settings.path, directory)
        tensors = multimodal_tensors(tensors, settings.path, config.dtype)
    else:
        write_config(config, settings, directory)
    write_weights(tensors, directory)


def check_no_other_files(output: Path, source: Path) -> None:
    """Check that a directory has no files but those that an export of a checkpoint writes.

    Raises:
        UserError: It has files of another origin, such as evaluation results.
    """
    written = {CONFIG_NAME, GENERATION_CONFIG_NAME, EXPORT_FILE, MODEL_CARD, ADAPTER_CONFIG, *PROCESSOR_FILES}
    written |= {path.name for folder in ("model_config", "tokenizer") for path in (source / folder).iterdir()}
    if any((source / "model_config").glob("*.py")):
        written |= {path.name for path in output.glob("*.py")}  # the code of the model's repository
    others = [path.name for path in output.iterdir() if path.name not in written and ".safetensors" not in path.name]
    if others:
        listed = ", ".join(sorted(others))
        raise UserError(f"{output}: has files that the export did not write ({listed}); move them first")


def remove_abandoned(output: Path) -> None:
    """Delete unfinished exports of `output` that nothing has been written to for a day: their processes were killed.

    Raises:
        OSError: A directory cannot be read.
    """
    for partial in output.parent.glob(f".{output.name}.*partial"):
        if time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir())) > ABANDONED_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def replace_directory(output: Path, partial: Path) -> None:
    """Move a finished export to its place, and delete the older one.

    Raises:
        OSError: A directory cannot be renamed.
    """
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def warn_if_tokenizer_differs(original: Path, output: Path) -> None:
    """Warn if AutoTokenizer cannot load the tokenizer of an export, or does not load the same one.

    This happens for model types that have their own tokenizer class.
    """
    packed = load_tokenizer(original)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = AutoTokenizer.from_pretrained(output, trust_remote_code=False)
    except Exception as error:  # a tokenizer class can raise almost any exception
        _warn(output, f"AutoTokenizer cannot load the tokenizer ({first_line(error)})")
        return
    # The fingerprint does not cover the decoder, whose JSON is comparable within one version of the library.
    decoders = [json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] for tokenizer in (loaded, packed)]
    if fingerprint(loaded) != fingerprint(packed) or decoders[0] != decoders[1]:
        _warn(output, "AutoTokenizer uses the tokenizer class of the model type and tokenizes or decodes differently")


def _warn(output: Path, reason: str) -> None:
    print(f"warning: {output}: {reason}; load it with PreTrainedTokenizerFast.from_pretrained")

"""Fingerprint of a Hugging Face model directory."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedConfig

from pipeline.common.atomic_io import sha256_file
from pipeline.common.errors import read_error

# Files that determine what a model generates. Result files may be in the same directory.
MODEL_FILES = (
    "*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.model", "*.jinja", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def model_fingerprint(directory: Path) -> str:
    """Return the hex SHA-256 over the names and contents of the weights, configurations and tokenizer of a model.

    All weights are read, several files at a time.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted({file for pattern in MODEL_FILES for file in directory.glob(pattern) if file.is_file()})
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_file, files))
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def base_fingerprint(name: str, config: PreTrainedConfig) -> str | None:
    """Return the fingerprint of a model directory, or the commit of a model on the Hub (None if unknown).

    Raises:
        StorageError: a file cannot be read.
    """
    if not Path(name).is_dir():
        return getattr(config, "_commit_hash", None)
    try:
        return model_fingerprint(Path(name))
    except OSError as error:
        raise read_error(Path(name), error) from error

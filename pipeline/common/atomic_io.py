"""Atomic file writes, tolerant JSON reads, and file hashes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file. The file is read in blocks.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Write a file so that readers see either the old or the complete new content.

    Args:
        path: File to create or replace.
        content: Bytes, or text to encode as UTF-8.
        durable: Flush the file to disk before the rename, so that it survives a power failure.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically with sorted keys, so that equal values give equal bytes.

    Raises:
        OSError: The file cannot be written.
    """
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json_or_none(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or contains no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def ensure_writable(directory: Path, setting: str = "--output") -> None:
    """Create an output directory if it is missing, and check that files can be created in it.

    Args:
        directory: Output directory.
        setting: Flag or configuration key of the directory, for the error message.

    Raises:
        UserError: The directory cannot be created or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(directory, os.W_OK):
            return
        reason = "permission denied"
    raise UserError(f"{directory}: cannot write to the output directory ({reason}); change {setting}")

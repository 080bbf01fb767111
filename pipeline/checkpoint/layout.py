"""Layout of checkpoint directories: names, completeness and rotation.

checkpoint-N/zero/               DeepSpeed's files, one set per rank
checkpoint-N/trainer_state.json  step, loader position, tokens seen, hashes of model and data, number of ranks
checkpoint-N/rng-RANK.safetensors, centres.safetensors (random generators, running means)
checkpoint-N/model_config/, tokenizer/  for export; multimodal_config/ if the model is the text decoder of a larger one
checkpoint-N/config.yaml         the recipe
checkpoint-N/COMPLETE            JSON: a random id, and size and SHA-256 of every file; written last. `validation`, if
                                 present, replaces that of trainer_state.json: the validation came after the save

`pipeline.checkpoint.saver` writes these files. .checkpoint-N.partial is a checkpoint that is still being written.
.checkpoint-N.universal is a copy of checkpoint-N in DeepSpeed's universal format, to resume with a different number of
ranks. If a run tries to resume from a checkpoint in which a file does not match its checksum, COMPLETE is renamed to
DAMAGED. A missing or truncated file needs no such mark, because sizes are cheap to compare (`find_damage`).
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import StorageError, UserError, first_line, read_error, storage_errors

if TYPE_CHECKING:
    # `pipeline.status` lists checkpoints without these imports, which take seconds.
    import torch
    from transformers import PreTrainedConfig

    from pipeline.config.settings import Config

COMPLETE_MARKER = "COMPLETE"
DAMAGED_MARKER = "DAMAGED"
DEEPSPEED_TAG = "zero"  # DeepSpeed calls the subdirectory of its files a tag


@dataclass(frozen=True)
class ModelIdentity:
    """Properties of a model that are recorded in trainer_state.json and must match to resume.

    Attributes:
        vocab_size: Number of vocabulary entries, without padding.
        padded_size: Number of vocabulary rows, including padding.
        languages: Languages of the data, in the order of the running means.
        embedding_group: Whether the optimizer has a parameter group for the input embedding.
        fingerprints: Hashes of the content that settings name by path, by setting. Empty in checkpoints of older
            versions.
    """

    vocab_size: int
    padded_size: int
    languages: list[str]
    embedding_group: bool = False
    fingerprints: dict[str, str | None] = field(default_factory=dict)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint directory.

    Raises:
        ValueError: The name is not checkpoint-N.
    """
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(directory: Path, markers: Sequence[str] = (COMPLETE_MARKER,)) -> list[Path]:
    """Return a run's finished checkpoints, oldest first. Their files may still be damaged; see `find_damage`.

    Args:
        directory: Directory of the checkpoints.
        markers: A checkpoint counts as finished if it has any of these files.

    Raises:
        StorageError: The directory exists but cannot be read.
    """
    with storage_errors(directory):
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = [directory / name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
        return sorted((path for path in paths if any((path / marker).is_file() for marker in markers)), key=step_of)


def complete_marker(files: dict[str, tuple[int, str]]) -> str:
    """Return the content of COMPLETE, with a new random id.

    Args:
        files: Size in bytes and hex SHA-256 of each file, by path in the checkpoint.
    """
    sizes = {name: size for name, (size, _) in sorted(files.items())}
    hashes = {name: digest for name, (_, digest) in sorted(files.items())}
    return json.dumps({"id": uuid.uuid4().hex, "files": sizes, "sha256": hashes}, indent=1)


def read_marker(path: Path) -> dict[str, Any]:
    """Return the content of COMPLETE, or an empty dict if it is missing or damaged.

    Raises:
        StorageError: It exists but cannot be read.
    """
    with storage_errors(path / COMPLETE_MARKER):
        try:
            marker = json.loads((path / COMPLETE_MARKER).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
    return marker if isinstance(marker, dict) else {}


def checksums(path: Path) -> dict[str, str]:
    """Return the hex SHA-256 of each file of a checkpoint; empty for a checkpoint of an older version.

    Raises:
        StorageError: COMPLETE cannot be read.
    """
    return dict(read_marker(path).get("sha256", {}))


def store_validation(path: Path, validation: dict[str, Any]) -> None:
    """Store the progress of a validation in a checkpoint that was saved before it. Do nothing if it is not complete.

    It is stored in COMPLETE, because a checksum and the file that it belongs to cannot be replaced at once.

    Raises:
        StorageError: COMPLETE cannot be read.
        OSError: COMPLETE cannot be replaced.
    """
    if marker := read_marker(path):
        write_atomically(path / COMPLETE_MARKER, json.dumps(marker | {"validation": validation}, indent=1))


def mark_damaged(path: Path) -> None:
    """Make a complete checkpoint count as incomplete, so that it is skipped and may be replaced. No file is deleted.

    Raises:
        OSError: The marker cannot be renamed.
    """
    os.replace(path / COMPLETE_MARKER, path / DAMAGED_MARKER)


def find_damage(path: Path) -> str | None:
    """Return a description of the first missing or truncated file of a checkpoint, or None if there is none.

    It compares sizes only; see `pipeline.checkpoint.resume.find_corruption` for contents.

    Raises:
        StorageError: COMPLETE or the size of a file cannot be read.
    """
    sizes = read_marker(path).get("files")
    if not isinstance(sizes, dict):
        return f"{path / COMPLETE_MARKER} is missing or unreadable"
    for name, expected in sizes.items():
        with storage_errors(path / name):
            try:
                actual = (path / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return f"{path / name} is missing"
        if actual != expected:
            return f"{path / name} has {actual} bytes, {expected} were written"
    return None


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest intact checkpoint of a run, or None. Prints a warning for each damaged one it skips.

    Raises:
        StorageError: A checkpoint cannot be read.
    """
    for path in reversed(list_checkpoints(directory)):
        if (damage := find_damage(path)) is None:
            return path
        print(f"warning: {damage}; skipping {path.name}", flush=True)
    return None


def _is_known_intact(path: Path) -> bool:
    try:
        return find_damage(path) is None
    except StorageError:
        return False


def universal_path(output_dir: Path, path: Path) -> Path:
    """Return the path of the copy of a checkpoint in DeepSpeed's universal format."""
    return output_dir / f".{path.name}.universal"


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that the saver deletes the rest if this process is killed.

    Raises:
        OSError: The directory cannot be renamed.
    """
    deleted = path.with_name(f".{path.name}.deleted.partial")
    shutil.rmtree(deleted, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(path, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def rotate_checkpoints(directory: Path, limit: int, best_step: int | None = None, copied: Path | None = None) -> None:
    """Delete all but the newest `limit` checkpoints, and universal copies of checkpoints that no longer exist.

    Checkpoints that are damaged, or cannot be read now, are neither counted nor deleted.

    Args:
        directory: Directory of the checkpoints.
        limit: Number of checkpoints to keep, including the best one. A limit of 1 keeps both the newest and the best.
        best_step: Step of the best checkpoint, which is never deleted, or None.
        copied: Checkpoint that is being copied, which is not deleted yet, or None.

    Raises:
        StorageError: The directory cannot be read.
        OSError: A checkpoint cannot be renamed.
    """
    checkpoints = [path for path in list_checkpoints(directory) if _is_known_intact(path)]
    best = [path for path in checkpoints[:-1] if step_of(path) == best_step]
    others = [path for path in checkpoints if path not in best]
    for path in others[: -max(1, limit - len(best))]:
        if path != copied:
            remove_checkpoint(path)
    for copy in directory.glob(".checkpoint-*.universal"):
        if not (directory / copy.stem.removeprefix(".")).exists():
            shutil.rmtree(copy, ignore_errors=True)


def model_signature(model: "torch.nn.Module") -> str:
    """Return a hash of all parameter names and full (unpartitioned) shapes."""
    shapes = [f"{name} {tuple(getattr(p, 'ds_shape', p.shape))}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def recipe_yaml(config: "Config") -> str:
    """Serialize a configuration as a recipe that can be loaded again."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # converts tuples to lists
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn any error while a file of a checkpoint is read and parsed into a UserError that names the file.

    Raises:
        StorageError: The file system failed.
        UserError: The block raised any other exception.
    """
    try:
        yield
    except Exception as error:  # the libraries that parse these files raise many types
        if isinstance(error, OSError) and error.errno is not None:  # transformers raises OSError for invalid JSON
            raise read_error(file, error) from error
        reason = first_line(error) or type(error).__name__
        raise UserError(
            f"{file}: unreadable ({reason}); remove {file.parent} to use the previous checkpoint"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """Read the trainer state of an intact checkpoint: trainer_state.json, with the `validation` of COMPLETE if present.

    Raises:
        StorageError: The file system failed.
        UserError: The directory is not a complete checkpoint, or the file is unreadable.
    """
    if (damage := find_damage(path)) is not None:
        raise UserError(f"{path}: not a complete checkpoint ({damage}); use another")
    with reading(path / "trainer_state.json"):
        state = dict(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
    return state | {key: value for key, value in read_marker(path).items() if key == "validation"}


def read_model_config(path: Path, trust_remote_code: bool, folder: str = "model_config") -> "PreTrainedConfig":
    """Read the Hugging Face configuration in a checkpoint.

    Args:
        path: Checkpoint directory.
        trust_remote_code: `model.trust_remote_code` of the recipe: whether code of the model's repository may run.
        folder: `model_config`, or `multimodal_config` for the whole model of which the text decoder is trained.

    Raises:
        UserError: It is unreadable.
    """
    from transformers import AutoConfig  # takes seconds

    with reading(path / folder):
        return AutoConfig.from_pretrained(path / folder, trust_remote_code=trust_remote_code)

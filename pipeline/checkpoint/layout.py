"""checkpoint-N directories: what is in one, which are whole, and the newest loaded into an engine.

checkpoint-N/zero/               DeepSpeed's own files, one set per rank
checkpoint-N/trainer_state.json  step, loader position, tokens seen, model signature, number of ranks
checkpoint-N/rng-RANK.safetensors, centres.safetensors
checkpoint-N/model_config/, tokenizer/  for export
checkpoint-N/config.yaml         the recipe
checkpoint-N/COMPLETE            JSON: a random id and every file's size; written last

`pipeline.checkpoint.saver` writes them. .checkpoint-N.partial is one being written, .checkpoint-N.universal a copy of
checkpoint-N in DeepSpeed's universal format, for another number of ranks.
"""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.common.errors import UserError
from pipeline.config.settings import Config

COMPLETE_MARKER = "COMPLETE"
DEEPSPEED_TAG = "zero"  # DeepSpeed's name for the folder of its files


@dataclass(frozen=True)
class ModelIdentity:
    """What a checkpoint records of its model in trainer_state.json, and a run compares before it resumes.

    Attributes:
        vocab_size: Rows of the model's own vocabulary.
        padded_size: Rows of the vocabulary as trained, padding included.
        languages: Languages of the data; their order is the order of the running means.
    """

    vocab_size: int
    padded_size: int
    languages: list[str]


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run that were finished, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if (path / COMPLETE_MARKER).is_file()]
    return sorted((p for p in found if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def damage(path: Path) -> str | None:
    """The first file of a finished checkpoint that is not as it was written; None where all are."""
    try:
        sizes = json.loads((path / COMPLETE_MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / COMPLETE_MARKER} is missing or unreadable"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{path / name} is missing"
        if found != size:
            return f"{path / name} has {found} bytes, {size} were written"
    return None


def newest(directory: Path) -> Path | None:
    """The newest checkpoint whose files are all there; warns of those passed over."""
    for path in reversed(checkpoints(directory)):
        if (problem := damage(path)) is None:
            return path
        print(f"warning: {problem}; {path.name} is passed over", flush=True)
    return None


def universal_copy(output_dir: Path, path: Path) -> Path:
    return output_dir / f".{path.name}.universal"


def remove(path: Path) -> None:
    """The marker first, so that a half-deleted directory never counts as complete."""
    (path / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def retire(directory: Path, limit: int) -> None:
    """Drop the oldest checkpoints beyond `limit`, and universal copies whose checkpoint is gone."""
    for old in checkpoints(directory)[:-limit]:
        remove(old)
    for copy in directory.glob(".checkpoint-*.universal"):
        if not (directory / copy.stem.removeprefix(".")).exists():
            shutil.rmtree(copy, ignore_errors=True)


def model_signature(model: torch.nn.Module) -> str:
    """Hash of all parameter names and shapes."""
    shapes = [f"{name} {tuple(getattr(p, 'ds_shape', p.shape))}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def recipe_yaml(config: Config) -> str:
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples to lists
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read_state(path: Path) -> dict[str, Any]:
    """trainer_state.json. Raises UserError where the directory is not a whole checkpoint."""
    if (problem := damage(path)) is not None:
        raise UserError(f"{path}: not a complete checkpoint ({problem}); use another")
    try:
        return dict(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/trainer_state.json: unreadable ({error}); remove this checkpoint") from error

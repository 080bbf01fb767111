"""checkpoint-N directories: what is in one, which are whole, and the newest loaded into an engine.

checkpoint-N/zero/               DeepSpeed's own files, one set per rank
checkpoint-N/trainer_state.json  step, loader position, tokens seen, model signature, number of ranks
checkpoint-N/rng-RANK.safetensors, centres.safetensors
checkpoint-N/model_config/, tokenizer/  for export
checkpoint-N/config.yaml         the recipe
checkpoint-N/COMPLETE            JSON: a random id and every file's size; written last

`pipeline.saving` writes them. .checkpoint-N.partial is one being written, .checkpoint-N.universal a copy of
checkpoint-N in DeepSpeed's universal format, for another number of ranks.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from data_prep.errors import UserError
from pipeline import dist
from pipeline.config import Config
from pipeline.prepare import Prepared
from pipeline.zero import ZeroEngine

MARKER = "COMPLETE"
TAG = "zero"  # DeepSpeed's name for the folder of its files


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run that were finished, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if (path / MARKER).is_file()]
    return sorted((p for p in found if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def damage(path: Path) -> str | None:
    """The first file of a finished checkpoint that is not as it was written; None where all are."""
    try:
        sizes = json.loads((path / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / MARKER} is missing or unreadable"
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


def to_resume(config: Config) -> Path | None:
    """The newest of output_dir or, where that has none, of training.copy_checkpoints_to."""
    found = newest(Path(config.output_dir))
    if found is None and config.training.copy_checkpoints_to:
        found = newest(Path(config.training.copy_checkpoints_to))
    return found


def universal_copy(output_dir: Path, path: Path) -> Path:
    return output_dir / f".{path.name}.universal"


def remove(path: Path) -> None:
    """The marker first, so that a half-deleted directory never counts as complete."""
    (path / MARKER).unlink(missing_ok=True)
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


def check_resumable(path: Path, prepared: Prepared) -> dict[str, Any]:
    """The state of a checkpoint, if this run can go on from it. Any number of ranks can.

    Raises:
        UserError: other vocabulary or languages.
    """
    state = read_state(path)
    if (state["vocab_size"], state["padded_size"]) != (prepared.vocab_size, prepared.padded_size):
        raise UserError(
            f"{path}: checkpoint of another model (vocabulary {state['vocab_size']} padded to {state['padded_size']}, "
            f"here {prepared.vocab_size} padded to {prepared.padded_size}); use another output_dir"
        )
    if state["languages"] != prepared.languages:
        raise UserError(f"{path}: checkpoint of other data (languages {state['languages']}); use another output_dir")
    return state


def load(path: Path, state: dict[str, Any], prepared: Prepared, zero: ZeroEngine) -> None:
    """Weights, optimizer, RNG and centres of a checkpoint into an engine.

    Raises:
        UserError: parameters with other names or shapes.
    """
    if state["model_signature"] != model_signature(zero.engine.module):
        raise UserError(f"{path}: checkpoint of another model (other parameters); use another output_dir")
    same_ranks = state["ranks"] == dist.world_size()
    folder = path if same_ranks else universal_copy(Path(prepared.config.output_dir), path)
    if not zero.load(folder, TAG):
        raise UserError(f"{folder}/{TAG}: DeepSpeed cannot load it; remove {path} to go on from the one before")
    if same_ranks:
        rng = load_file(path / f"rng-{dist.rank()}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    else:
        # The states of other ranks' generators do not map: each starts anew, from what any restart here would see.
        words = np.random.SeedSequence([prepared.config.seed, state["step"], dist.rank()]).generate_state(1)
        torch.manual_seed(int(words[0]))
    if zero.centres is not None:
        saved = load_file(path / "centres.safetensors")
        zero.centres.means.copy_(saved["means"])
        zero.centres.seen.copy_(saved["seen"])

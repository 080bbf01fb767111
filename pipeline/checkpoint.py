"""checkpoint-N directories: written aside, marked complete last, renamed into place; the newest complete one resumes.

checkpoint-N/zero/               DeepSpeed's own files, one set per rank
checkpoint-N/trainer_state.json  step, loader position, tokens seen, model signature, number of ranks
checkpoint-N/rng-RANK.safetensors, centres.safetensors
checkpoint-N/hf/                 model configuration and tokenizer, for export
checkpoint-N/config.yaml         the recipe
checkpoint-N/COMPLETE            written last
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from pipeline import dist
from pipeline.config import Config
from pipeline.prepare import Prepared
from pipeline.zero import ZeroEngine

MARKER = "COMPLETE"


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if (path / MARKER).is_file()]
    return sorted((p for p in found if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def model_signature(model: torch.nn.Module) -> str:
    """Hash of all parameter names and shapes."""
    shapes = [f"{name} {tuple(getattr(p, 'ds_shape', p.shape))}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def recipe_yaml(config: Config) -> str:
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples to lists
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def save(prepared: Prepared, zero: ZeroEngine, state: dict[str, Any]) -> Path:
    """Write checkpoint-<step> from all ranks; drop the oldest beyond training.save_total_limit."""
    directory = Path(prepared.config.output_dir)
    final = directory / f"checkpoint-{state['step']}"
    partial = directory / f".{final.name}.partial"
    if dist.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    zero.engine.save_checkpoint(str(partial), tag="zero", save_latest=False)
    save_file(_rng_state(), partial / f"rng-{dist.rank()}.safetensors")
    dist.barrier()
    if dist.is_main():
        _write_common_files(partial, prepared, zero, state)
        _sync_tree(partial)
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        for old in checkpoints(directory)[: -prepared.config.training.save_total_limit]:
            _remove(old)
    dist.barrier()
    return final


def _write_common_files(path: Path, prepared: Prepared, zero: ZeroEngine, state: dict[str, Any]) -> None:
    facts = {
        "ranks": dist.world_size(),
        "vocab_size": prepared.vocab_size,
        "padded_size": prepared.padded_size,
        "languages": prepared.languages,
        "vocabulary_parameters": zero.vocabulary_names(),
        "tied": zero.tied,
        "model_signature": model_signature(zero.engine.module),
    }
    (path / "trainer_state.json").write_text(json.dumps(state | facts, indent=1))
    (path / "config.yaml").write_text(recipe_yaml(prepared.config), encoding="utf-8")
    if zero.centres is not None:
        tensors = {"means": zero.centres.means.cpu(), "seen": zero.centres.seen.cpu()}
        save_file(tensors, path / "centres.safetensors")
    prepared.model_config.save_pretrained(path / "model_config")
    prepared.tokenizer.save_pretrained(path / "tokenizer")
    (path / MARKER).write_text(f"step {state['step']}\n")


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _sync_tree(path: Path) -> None:
    """Flush every file to disk before the rename makes them count."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _remove(path: Path) -> None:
    """The marker first, so that a half-deleted directory never counts as complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """trainer_state.json. Raises UserError where the directory is not a complete checkpoint."""
    if not (path / MARKER).is_file():
        raise UserError(f"{path}: not a complete checkpoint (no {MARKER} in it)")
    try:
        return dict(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/trainer_state.json: unreadable ({error}); remove this checkpoint") from error


def check_resumable(path: Path, prepared: Prepared, ranks: int) -> dict[str, Any]:
    """The state of a checkpoint, if this run can go on from it.

    Raises:
        UserError: other vocabulary, languages or number of ranks.
    """
    state = read_state(path)
    if (state["vocab_size"], state["padded_size"]) != (prepared.vocab_size, prepared.padded_size):
        raise UserError(
            f"{path}: checkpoint of another model (vocabulary {state['vocab_size']} padded to {state['padded_size']}, "
            f"here {prepared.vocab_size} padded to {prepared.padded_size}); use another output_dir"
        )
    if state["languages"] != prepared.languages:
        raise UserError(f"{path}: checkpoint of other data (languages {state['languages']}); use another output_dir")
    if state["ranks"] != ranks:
        raise UserError(f"{path}: saved by {state['ranks']} ranks and cannot resume on {ranks}; start {state['ranks']}")
    return state


def load(path: Path, state: dict[str, Any], zero: ZeroEngine) -> None:
    """Weights, optimizer, RNG and centres of a checkpoint into an engine.

    Raises:
        UserError: parameters with other names or shapes.
    """
    if state["model_signature"] != model_signature(zero.engine.module):
        raise UserError(f"{path}: checkpoint of another model (other parameters); use another output_dir")
    loaded, _ = zero.engine.load_checkpoint(str(path), tag="zero")
    if loaded is None:
        raise UserError(f"{path}/zero: DeepSpeed cannot load it; remove this checkpoint to go on from the one before")
    rng = load_file(path / f"rng-{dist.rank()}.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    if zero.centres is not None:
        saved = load_file(path / "centres.safetensors")
        zero.centres.means.copy_(saved["means"])
        zero.centres.seen.copy_(saved["seen"])

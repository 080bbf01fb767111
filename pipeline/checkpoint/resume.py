"""Find the checkpoint to resume from, check it and load it into an engine."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import (
    DEEPSPEED_TAG,
    ModelIdentity,
    model_signature,
    newest_checkpoint,
    read_state,
    universal_path,
)
from pipeline.common import distributed
from pipeline.common.atomic_io import sha256_file
from pipeline.common.errors import AgreedError, StorageError, UserError, read_error, write_error
from pipeline.config.settings import Config
from pipeline.zero3.engine import ZeroEngine


def find_resumable(config: Config) -> Path | None:
    """Return the newest checkpoint whose files have their sizes, or None if the run has not saved any.

    It is looked for in output_dir, and if there is none, in training.copy_checkpoints_to.

    Raises:
        StorageError: A checkpoint cannot be read.
        UserError: There are checkpoints, but all of them are damaged.
    """
    directories = [Path(path) for path in (config.output_dir, config.training.copy_checkpoints_to) if path]
    for directory in directories:
        if (path := newest_checkpoint(directory)) is not None:
            return path
    for directory in directories:
        if damaged := layout.list_checkpoints(directory, (layout.COMPLETE_MARKER, layout.DAMAGED_MARKER)):
            names = ", ".join(path.name for path in damaged)
            raise UserError(
                f"{directory}: all checkpoints are damaged ({names}); restore one from a backup, or use another "
                "output_dir to start over"
            )
    return None


def find_verified(config: Config, heartbeat: Callable[[], None]) -> Path | None:
    """Return the newest checkpoint whose files have their checksums, or None if the run has not saved any.

    Damaged checkpoints are skipped and marked, so that they are not checked again and may be replaced. Collective: all
    ranks must call it.

    Args:
        config: Settings of the run.
        heartbeat: Called before each file.

    Raises:
        AgreedError: A checkpoint cannot be read (with the status of a StorageError), all checkpoints are damaged, or a
            marker cannot be written.
    """
    while (path := distributed.broadcast_from_rank0(lambda: find_resumable(config))) is not None:
        damage = find_corruption(path, heartbeat)
        if damage is None:
            break
        distributed.broadcast_from_rank0(partial(_skip_damaged, path, damage))
    return path


def _skip_damaged(path: Path, damage: str) -> None:
    """Mark a checkpoint as damaged.

    Raises:
        UserError: The marker cannot be written.
    """
    print(f"warning: {damage}; skipping {path.name}", flush=True)
    try:
        layout.mark_damaged(path)
    except OSError as error:
        raise write_error(path, error) from error


def check_resumable(path: Path, model: ModelIdentity) -> dict[str, Any]:
    """Check that this run can resume from a checkpoint, and return the saved trainer state.

    The number of ranks may differ from the run that saved it.

    Raises:
        UserError: The checkpoint is damaged, or was saved with a different vocabulary, different languages, different
            parameter groups, or different content of a file or directory that a setting names.
    """
    state = read_state(path)
    if (state["vocab_size"], state["padded_size"]) != (model.vocab_size, model.padded_size):
        raise UserError(
            f"{path}: checkpoint of a different model (vocabulary {state['vocab_size']} "
            f"padded to {state['padded_size']}, here {model.vocab_size} padded to {model.padded_size}); "
            "restore model.vocab_multiple if only the padding differs, or use another output_dir"
        )
    if state["languages"] != model.languages:
        raise UserError(
            f"{path}: checkpoint of different data (languages {state['languages']}); use another output_dir"
        )
    # A checkpoint without this key is older than the setting.
    if state.get("embedding_group", False) != model.embedding_group:
        was, now = ("null", "set") if model.embedding_group else ("set", "null")
        raise UserError(
            f"{path}: training.embedding_learning_rate was {was} when it was saved and is {now} here, so the optimizer "
            "has other parameter groups; restore the setting or use another output_dir"
        )
    for key, fingerprint in state.get("fingerprints", {}).items():
        if model.fingerprints.get(key) != fingerprint:
            raise UserError(
                f"{path}: trained with different content of {key}; restore it, or use another output_dir for a new run"
            )
    return state


def find_corruption(path: Path, heartbeat: Callable[[], None]) -> str | None:
    """Compare the content of a checkpoint with its checksums. Collective: all ranks must call it.

    Each rank reads its own files if the checkpoint was saved by the same number of ranks, so that they are in its page
    cache when they are loaded.

    Args:
        path: Checkpoint directory.
        heartbeat: Called before each file.

    Returns:
        A description of the first damaged file, or None if all are intact.

    Raises:
        AgreedError: A rank cannot read a file, which says nothing about its content. The exit status is that of a
            StorageError.
    """
    damage, failure = None, None
    for name, expected in distributed.broadcast_from_rank0(lambda: layout.checksums(path)).items():
        owner = re.search(r"(?:pp_rank_|rng-)(\d+)", name)
        if (int(owner[1]) if owner else 0) % distributed.world_size() != distributed.rank():
            continue
        heartbeat()
        try:
            if sha256_file(path / name) != expected:
                damage = f"{path / name} does not have its SHA-256 of {layout.COMPLETE_MARKER}"
                break
        except OSError as error:
            failure = f"{distributed.rank_label()}: {read_error(path / name, error)}"
            break
    results = distributed.all_gather_object((damage, failure))
    for _, failure in results:
        if failure is not None:
            raise AgreedError(failure, StorageError.status)
    return next((damage for damage, _ in results if damage is not None), None)


def load(path: Path, state: dict[str, Any], config: Config, engine: ZeroEngine) -> None:
    """Load the weights, optimizer state, random generators and running means from a checkpoint.

    Args:
        path: Checkpoint directory. If it was saved with a different number of ranks, it must have been converted to a
            universal checkpoint before.
        state: Its trainer state.
        config: Settings of this run.
        engine: Engine to load into.

    Raises:
        UserError: The names or shapes of the parameters differ, or DeepSpeed cannot load its files.
    """
    if state["model_signature"] != model_signature(engine.ds_engine.module):
        raise UserError(f"{path}: checkpoint of a different model (different parameters); use another output_dir")
    same_ranks = state["ranks"] == distributed.world_size()
    source = path if same_ranks else universal_path(Path(config.output_dir), path)
    if not engine.load_checkpoint(source, DEEPSPEED_TAG):
        raise UserError(
            f"{source}/{DEEPSPEED_TAG}: DeepSpeed cannot load it; remove {path} to resume from the previous checkpoint"
        )
    if same_ranks:
        rng = load_file(path / f"rng-{distributed.rank()}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    else:
        # Saved generator states do not map to other ranks. Seed from (seed, step, rank), so that every restart from
        # this checkpoint draws the same numbers.
        seeds = np.random.SeedSequence([config.seed, state["step"], distributed.rank()]).generate_state(1)
        torch.manual_seed(int(seeds[0]))
    if engine.running_means is not None:
        saved = load_file(path / "centres.safetensors")
        engine.running_means.means.copy_(saved["means"])
        engine.running_means.seen.copy_(saved["seen"])

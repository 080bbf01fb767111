"""Find the checkpoint to resume from, check it and load it into an engine."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.layout import (
    DEEPSPEED_TAG,
    ModelIdentity,
    model_signature,
    newest,
    read_state,
    universal_copy,
)
from pipeline.common import distributed
from pipeline.common.errors import UserError
from pipeline.config.settings import Config
from pipeline.zero3.engine import ZeroEngine


def to_resume(config: Config) -> Path | None:
    """The newest of output_dir or, where that has none, of training.copy_checkpoints_to."""
    found = newest(Path(config.output_dir))
    if found is None and config.training.copy_checkpoints_to:
        found = newest(Path(config.training.copy_checkpoints_to))
    return found


def check_resumable(path: Path, model: ModelIdentity) -> dict[str, Any]:
    """The state of a checkpoint, if this run can go on from it. Any number of ranks can.

    Raises:
        UserError: other vocabulary or languages.
    """
    state = read_state(path)
    if (state["vocab_size"], state["padded_size"]) != (model.vocab_size, model.padded_size):
        raise UserError(
            f"{path}: checkpoint of another model (vocabulary {state['vocab_size']} padded to {state['padded_size']}, "
            f"here {model.vocab_size} padded to {model.padded_size}); use another output_dir"
        )
    if state["languages"] != model.languages:
        raise UserError(f"{path}: checkpoint of other data (languages {state['languages']}); use another output_dir")
    return state


def load(path: Path, state: dict[str, Any], config: Config, zero: ZeroEngine) -> None:
    """Weights, optimizer, RNG and centres of a checkpoint into an engine.

    Raises:
        UserError: parameters with other names or shapes.
    """
    if state["model_signature"] != model_signature(zero.engine.module):
        raise UserError(f"{path}: checkpoint of another model (other parameters); use another output_dir")
    same_ranks = state["ranks"] == distributed.world_size()
    folder = path if same_ranks else universal_copy(Path(config.output_dir), path)
    if not zero.load(folder, DEEPSPEED_TAG):
        raise UserError(
            f"{folder}/{DEEPSPEED_TAG}: DeepSpeed cannot load it; remove {path} to go on from the one before"
        )
    if same_ranks:
        rng = load_file(path / f"rng-{distributed.rank()}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    else:
        # The states of other ranks' generators do not map: each starts anew, from what any restart here would see.
        words = np.random.SeedSequence([config.seed, state["step"], distributed.rank()]).generate_state(1)
        torch.manual_seed(int(words[0]))
    if zero.running_means is not None:
        saved = load_file(path / "centres.safetensors")
        zero.running_means.means.copy_(saved["means"])
        zero.running_means.seen.copy_(saved["seen"])

"""Collect the state of a DeepSpeed engine for a checkpoint, and load it."""

import pickle
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from pipeline.common.errors import UserError
from pipeline.zero3.optimizer import complete_state, repair_step_counts
from pipeline.zero3.safe_loading import weights_only_loading


class StateCollector(TorchCheckpointEngine):
    """Checkpoint engine that collects the states to write, as {path: state}, for `pipeline.checkpoint.saver`."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing, because a failure on one rank would leave the others waiting in a collective."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the state instead of writing it."""
        self.files[path] = state_dict


def collect_state(ds_engine: DeepSpeedEngine, directory: Path, tag: str) -> dict[str, Any]:
    """Return the files that DeepSpeed would save for this rank in directory/tag, as {path in directory: state}.

    Frozen parameters are left out. The checkpoint engine must be a `StateCollector`. The states are references, not
    copies.
    """
    collector, zero = ds_engine.checkpoint_engine, ds_engine.optimizer
    complete_state(zero.optimizer, zero.fp32_partitioned_groups_flat)
    ds_engine.save_checkpoint(str(directory), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    files, collector.files = collector.files, {}
    return {str(Path(name).relative_to(directory)): state for name, state in files.items()}


def load_state(ds_engine: DeepSpeedEngine, directory: Path, tag: str) -> bool:
    """Load weights and optimizer state from directory/tag, but keep the settings of this run's parameter groups.

    A dynamic loss scale of fp16 continues with the settings of this run, too.

    Returns:
        False if DeepSpeed finds no checkpoint.

    Raises:
        UserError: a file is damaged, contains objects other than tensors and plain values, whose loading could run
            code, or was saved with other sub-groups of the optimizer.
    """
    groups = [{k: v for k, v in g.items() if k != "params"} for g in ds_engine.optimizer.param_groups]
    scaler = ds_engine.optimizer.loss_scaler
    try:
        with weights_only_loading():
            complete = all(parameter.requires_grad for parameter in ds_engine.module.parameters())
            loaded, _ = ds_engine.load_checkpoint(str(directory), tag=tag, load_module_strict=complete)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{directory / tag}: damaged, or with code that a checkpoint must not have: {reason}"
        ) from error
    except (ValueError, RuntimeError) as error:
        # From a different number of sub-groups, or from the same number with different sizes.
        if "parameter group" not in str(error) and "size of tensor" not in str(error):
            raise
        raise UserError(
            f"{directory / tag}: saved with another zero_optimization.sub_group_size; restore it in the DeepSpeed "
            "file, or resume on another number of ranks, for which the checkpoint is converted"
        ) from error
    if loaded is None:
        return False
    for group, own in zip(ds_engine.optimizer.optimizer.param_groups, groups, strict=True):
        group.update(own)
    repair_step_counts(ds_engine.optimizer.optimizer)
    saved, ds_engine.optimizer.loss_scaler = ds_engine.optimizer.loss_scaler, scaler
    if scaler.dynamic and saved.dynamic:
        scaler.cur_scale = max(saved.cur_scale, scaler.min_scale)
        scaler.cur_hysteresis = min(saved.cur_hysteresis, scaler.delayed_shift)
        scaler.cur_iter, scaler.last_overflow_iter = saved.cur_iter, saved.last_overflow_iter
    return True

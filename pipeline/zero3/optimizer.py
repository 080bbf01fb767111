"""Build AdamW for the engine, and restore its state after loading a universal checkpoint."""

from typing import Any

import deepspeed
import torch
from torch import nn

from pipeline.common.distributed import local_device
from pipeline.config.settings import Config
from pipeline.models.param_groups import adamw_arguments


def build_optimizer(
    config: Config, ds: dict[str, Any], module: nn.Module, embedding: nn.Parameter
) -> torch.optim.Optimizer:
    """Build AdamW, or DeepSpeed's CPU version if the optimizer is offloaded."""
    groups, options = adamw_arguments(module, embedding, config.training)
    if ds["zero_optimization"].get("offload_optimizer", {}).get("device") in ("cpu", "nvme"):
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=local_device().type == "cuda", **options)


def repair_universal_state(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Restore optimizer state that DeepSpeed 0.19 corrupts when it loads a universal checkpoint.

    DeepSpeed overwrites all parameter groups with the settings of the first, and stores step counts in a type that
    the optimizer does not accept.

    Args:
        optimizer: the optimizer inside DeepSpeed's.
        groups: the settings of its parameter groups before loading.
    """
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    fused = bool(optimizer.param_groups[0].get("fused"))
    for parameter, state in optimizer.state.items():
        step = float(state["step"])
        if isinstance(optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
            state["step"] = int(step)
        else:
            state["step"] = torch.tensor(step, device=parameter.device if fused else "cpu")

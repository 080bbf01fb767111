"""Build AdamW for the engine, complete its state for a checkpoint, and restore what a checkpoint changes."""

from collections.abc import Iterable
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
    """Build AdamW, or DeepSpeed's CPU version if the optimizer is offloaded from a GPU.

    CPU ranks use torch's AdamW in both cases, because DeepSpeed would compile its own version at the first start.
    """
    groups, options = adamw_arguments(module, embedding, config.training)
    on_gpu = local_device().type == "cuda"
    if on_gpu and ds["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=on_gpu, **options)


def complete_state(optimizer: torch.optim.Optimizer, weights: Iterable[torch.Tensor]) -> None:
    """Give weights that have not been updated yet the state that AdamW begins with.

    AdamW creates it at the first update, which fp16 may have skipped so far. DeepSpeed cannot convert a checkpoint
    without it to another number of ranks.

    Args:
        optimizer: the optimizer.
        weights: the flat fp32 weights that it updates.
    """
    missing = [weight for weight in weights if not optimizer.state.get(weight)]
    for weight in missing:
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": 0, **moments}
    if missing:
        repair_step_counts(optimizer)


def repair_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Convert loaded step counts to the type that the optimizer requires.

    DeepSpeed 0.19 loads another type from a universal checkpoint, and from one with another kind of offloading.
    """
    fused = bool(optimizer.param_groups[0].get("fused"))
    for parameter, state in optimizer.state.items():
        step = float(state["step"])
        if isinstance(optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
            state["step"] = int(step)
        else:
            state["step"] = torch.tensor(step, device=parameter.device if fused else "cpu")

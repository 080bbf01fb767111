"""Gather ZeRO-3's persistent parameters in one collective after a step.

Persistent parameters are small ones, such as norms and biases, which every rank keeps whole. DeepSpeed gathers each in
its own collective. Its `all_gather_coalesced` would use one collective, but with hpZ it reads copies from before the
update.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from pipeline.common.distributed import local_device, world_size
from pipeline.loss.comm import all_gather


def gather_together_after_steps(persistent: list[Any]) -> None:
    """Make DeepSpeed gather these parameters in one collective.

    Args:
        persistent: the DeepSpeed optimizer's own list of persistent parameters (not a copy).
    """
    if not persistent or world_size() == 1:
        return
    # DeepSpeed calls `all_gather` of the first parameter with the complete list.
    first = persistent[0]
    original_all_gather = first.all_gather

    def all_gather_persistent(param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> None:
        if param_list is not persistent:
            return original_all_gather(param_list, async_op, hierarchy)
        missing: dict[torch.dtype, list[Any]] = {}
        for parameter in param_list:
            if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                missing.setdefault(parameter.ds_tensor.dtype, []).append(parameter)
        for parameters in missing.values():
            _gather(parameters)
        # DeepSpeed also synchronizes here, because the next forward gathers on a stream that does not wait for this
        # update.
        if not get_accelerator().resolves_data_dependency():
            get_accelerator().synchronize()

    first.all_gather = all_gather_persistent


@torch.no_grad()
def _gather(parameters: list[Any]) -> None:
    """Fill parameters of one dtype with their full data."""
    partitions = torch.cat([p.ds_tensor.to(local_device()).flatten() for p in parameters])
    rows = all_gather(partitions, dist.group.WORLD)
    for parameter, columns in zip(parameters, rows.split([p.ds_tensor.numel() for p in parameters], 1), strict=True):
        parameter.data = columns.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE

"""ZeRO-3's persistent parameters, which every rank keeps whole, gathered together after a step.

DeepSpeed gathers them one by one. Its own `all_gather_coalesced` would do it in one collective, but its host time grows
with parameters times ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from pipeline.common.distributed import local_device, world_size
from pipeline.loss.comm import all_gather


def gather_together_after_steps(persistent: list[Any]) -> None:
    """Have the engine that owns this list of its persistent parameters gather all of them in one collective."""
    if not persistent or world_size() == 1:
        return
    first = persistent[0]
    one_by_one = first.all_gather

    def gather_listed(param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> None:
        if param_list is not persistent:
            return one_by_one(param_list, async_op, hierarchy)
        absent: dict[torch.dtype, list[Any]] = {}
        for parameter in param_list:
            if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                absent.setdefault(parameter.ds_tensor.dtype, []).append(parameter)
        for parameters in absent.values():
            _gather(parameters)
        # As after DeepSpeed's own: the next forward gathers on a stream that does not wait for this one's update.
        if not get_accelerator().resolves_data_dependency():
            get_accelerator().synchronize()

    first.all_gather = gather_listed


@torch.no_grad()
def _gather(parameters: list[Any]) -> None:
    """Give each its full data, of all ranks' pieces; of one dtype."""
    pieces = torch.cat([p.ds_tensor.to(local_device()).flatten() for p in parameters])
    rows = all_gather(pieces, dist.group.WORLD)
    for parameter, columns in zip(parameters, rows.split([p.ds_tensor.numel() for p in parameters], 1), strict=True):
        parameter.data = columns.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE

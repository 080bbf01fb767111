"""Gather parameters and reduce gradients of ZeRO-3 without loops over ranks.

For each parameter, DeepSpeed slices the gathered weights and the gradient once per rank, and joins the slices. With
many ranks this takes the host longer than the layers take the GPU (docs/scaling.md). Here one or two strided copies per
parameter are enough. DeepSpeed also converts each averaged gradient to `gradient_accumulation_dtype` before it adds it;
here the addition converts. If that is fp32, accumulated gradients are equal to DeepSpeed's bit for bit.

Shape letters: R ranks, n elements of a parameter, p = ceil(n / R) elements of its partition.
"""

import math
from types import MethodType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.loss.comm import Group, rank_and_size, reduce_scatter_single

_STAGE3 = (
    "_DeepSpeedZeroOptimizer_Stage3"  # in the mangled names of the private members of DeepSpeedZeroOptimizer_Stage3
)
_wait_per_rank = AllGatherCoalescedHandle.wait


def avoid_loops_over_ranks(optimizer: Any) -> None:
    """Replace the reduce-scatter of gradients of an optimizer, and how gathers fill parameters in the whole process.

    With ZenFlow, `gradient_predivide_factor` or quantized gradients, the reduce-scatter is not replaced. With optimizer
    offloading, the accumulation is not.

    Args:
        optimizer: the ZeRO-3 optimizer of DeepSpeed.

    Raises:
        UserError: this version of DeepSpeed has no such functions.
    """
    require_members(optimizer, f"{_STAGE3}__avg_scatter_grads", "partition_grads")
    AllGatherCoalescedHandle.wait = wait_for_gather
    if optimizer.zenflow or optimizer.gradient_predivide_factor != 1 or optimizer.all2all_process_group is not None:
        return
    setattr(optimizer, f"{_STAGE3}__avg_scatter_grads", MethodType(_average_and_scatter, optimizer))
    if not optimizer.offload_optimizer:
        optimizer.partition_grads = MethodType(_accumulate, optimizer)


def require_members(owner: Any, *names: str) -> None:
    """Raise UserError if DeepSpeed lacks a member that this package replaces, so that replacing it would do nothing."""
    for name in names:
        if not hasattr(owner, name):
            raise UserError(f"deepspeed {deepspeed.__version__} has no {name}; install a version of pyproject.toml")


def wait_for_gather(handle: Any, handle_dependency: bool = True) -> None:
    """Wait for a gather and fill its parameters. Replaces `AllGatherCoalescedHandle.wait`."""
    if handle.complete or handle.quantization:
        _wait_per_rank(handle, handle_dependency)
        return
    handle.allgather_handle.wait()
    size = len(handle.partitions[0])
    buffer = handle.partitions[0].as_strided((handle.world_size, size), (size, 1))
    offset = 0
    for parameter in handle.params:
        numel = parameter.ds_tensor.ds_numel
        if handle.use_secondary_tensor:
            numel *= parameter.ds_secondary_tensor_num_of_groups
        whole = buffer[:, offset : offset + numel].reshape(-1)[: parameter.ds_numel]
        parameter.data = whole.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
        offset += numel
    handle.complete = True
    if buffer.is_cuda and handle_dependency:
        buffer.record_stream(torch.cuda.current_stream())
    elif buffer.is_cuda:
        AllGatherCoalescedHandle.data_buffer.append([buffer])


def reduce_scatter_mean(gradients: list[Tensor], group: Group) -> list[Tensor]:
    """Average gradients over ranks and return this rank's part of each. Collective: all ranks must call it.

    Args:
        gradients: [n] or any other shape, contiguous, of one dtype; may be overwritten.
        group: the process group, or None for a single process.

    Returns:
        For each gradient its elements [r p, min((r + 1) p, n)) on rank r; none if r p >= n.
    """
    rank, ranks = rank_and_size(group)
    flat = [gradient.view(-1) for gradient in gradients]
    if ranks == 1:
        return flat
    widths = [math.ceil(len(gradient) / ranks) for gradient in flat]
    if len(flat) == 1 and len(flat[0]) % ranks == 0:
        buffer = flat[0].view(ranks, -1).div_(ranks)
    else:
        buffer = flat[0].new_empty(ranks, sum(widths))
        for gradient, columns, width in zip(flat, buffer.split(widths, 1), widths, strict=True):
            if not width:
                continue
            full, rest = divmod(len(gradient), width)
            torch.div(gradient[: full * width].view(full, width), ranks, out=columns[:full])
            if rest:
                torch.div(gradient[full * width :], ranks, out=columns[full, :rest])
    reduce_scatter_single(buffer[rank], buffer.view(-1), group=group)
    lengths = [min(max(len(gradient) - rank * width, 0), width) for gradient, width in zip(flat, widths, strict=True)]
    return [part[:length] for part, length in zip(buffer[rank].split(widths), lengths, strict=True)]


def _average_and_scatter(optimizer: Any, parameters: list[Any], communication_dtype: torch.dtype) -> list[Tensor]:
    """Average the gradients of parameters. Replaces `__avg_scatter_grads` of DeepSpeed's ZeRO-3 optimizer."""
    group = optimizer._get_param_partition_group(parameters[0]) or dist.group.WORLD
    parts = reduce_scatter_mean([p.grad.to(communication_dtype) for p in parameters], group)
    # With optimizer offloading, DeepSpeed copies the parts to CPU memory next. A conversion on the GPU is faster.
    return [part.to(optimizer.gradient_accumulation_dtype) for part in parts] if optimizer.offload_optimizer else parts


def _accumulate(optimizer: Any, parameters: list[Any], parts: list[Tensor]) -> None:
    """Add averaged gradients to those of earlier micro-steps, and free `parameter.grad`.

    It replaces `partition_grads` if the optimizer is not offloaded.
    """
    accumulated = getattr(optimizer, f"{_STAGE3}__param_id_to_grad_partition")
    for parameter, part in zip(parameters, parts, strict=True):
        if len(part):
            total = accumulated[parameter.ds_id][: len(part)]
            if optimizer.micro_step_id == 0:
                total.copy_(part, non_blocking=True)
            else:
                total.add_(part)
        if parameter.grad.is_cuda:
            parameter.grad.record_stream(torch.cuda.current_stream())
        parameter.grad = None

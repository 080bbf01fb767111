"""Let the host run ahead of the GPU while DeepSpeed reduces gradients, and measure their norm in one pass.

DeepSpeed blocks the host at the end of each micro-step until all reductions are done, and in each layer until at most
two are pending. The GPU then runs out of work: on an H100, for 8 ms per micro-step and 1.5 ms per layer of a 7B model
(docs/performance.md). DeepSpeed also copies every gradient to float64 to compute the norm.
"""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero import stage3

from pipeline.zero3.partitions import require_members


class StreamWithoutHostSync(torch.cuda.Stream):
    """Stream whose `synchronize` makes the current stream wait for it, instead of the host."""

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self)


def run_ahead_of_reductions(optimizer: Any, layers: Iterable[Any]) -> None:
    """Let the host queue more work while gradients are reduced.

    The host may be ahead by the reductions of one decoder layer. The gradients of two layers are then in memory,
    because the memory of a gradient is reused only after its reduction. With `overlap_comm` on a GPU and without
    optimizer offloading, the current stream waits at the end of a micro-step instead of the host. Without offloading on
    a GPU, gradient norms are computed in fp32, in the whole process.

    Args:
        optimizer: the ZeRO-3 optimizer of DeepSpeed.
        layers: the decoder layers, partitioned.
    """
    trained = [[p.ds_numel for p in layer.parameters() if p.requires_grad] for layer in layers]
    reductions = [count_reductions(sizes, optimizer.reduce_bucket_size) for sizes in trained]
    optimizer.max_param_reduce_events = max(optimizer.max_param_reduce_events, *reductions)
    stream = optimizer.reduce_and_partition_stream
    # The host reads offloaded gradients, so it has to wait for them.
    if not isinstance(stream, torch.cuda.Stream) or optimizer.offload_optimizer:
        return
    if stream != torch.cuda.default_stream(stream.device):
        optimizer.reduce_and_partition_stream = StreamWithoutHostSync(stream.device)
    # torch sums fp32 in a tree on a GPU, so the relative error of the norm is about 1e-6 for any number of elements.
    require_members(stage3, "get_norm_dtype")
    stage3.get_norm_dtype = lambda: torch.float32


def count_reductions(sizes: list[int], bucket_size: int) -> int:
    """Count the reductions of a layer whose parameters have these numbers of elements, beginning with an empty bucket.

    DeepSpeed reduces a bucket before a gradient that does not fit, and does not split gradients.
    """
    reductions = elements = 0
    for size in sizes:
        if elements and elements + size > bucket_size:
            reductions, elements = reductions + 1, 0
        elements += size
    return reductions + (elements > 0)


def order_after_current_stream(optimizer: Any) -> None:
    """Make DeepSpeed's reduction stream wait for all work that is queued on the current stream."""
    stream = optimizer.reduce_and_partition_stream
    if isinstance(stream, torch.cuda.Stream):
        stream.wait_stream(torch.cuda.current_stream(stream.device))

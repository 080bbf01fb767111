"""What host and GPU wait for when DeepSpeed reduces gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.zero3.reductions import StreamWithoutHostSync, count_reductions, run_ahead_of_reductions


def partitioned_layer(sizes: list[int], frozen: int = 0) -> nn.Module:
    """Return a layer with the attributes that DeepSpeed adds to partitioned parameters."""
    layer = nn.Module()
    for index, size in enumerate([*sizes, frozen]):
        parameter = nn.Parameter(torch.empty(0), requires_grad=index < len(sizes))
        parameter.ds_numel = size
        layer.register_parameter(f"weight{index}", parameter)
    return layer


@pytest.mark.parametrize(
    ("sizes", "reductions"),
    [([], 0), ([50], 1), ([990], 1), ([60, 40], 1), ([60, 40, 1], 2), ([10, 990, 990, 10, 10], 4)],
    ids=["none", "small", "larger than the bucket", "full bucket", "one more", "around large ones"],
)
def test_count_reductions_fills_buckets_of_100(sizes: list[int], reductions: int) -> None:
    assert count_reductions(sizes, 100) == reductions


@pytest.mark.parametrize(("sizes", "events"), [([[50], [80] * 5], 5), ([[50]], 2), ([[]], 2)])
def test_host_may_be_ahead_by_one_layer(sizes: list[list[int]], events: int) -> None:
    optimizer = SimpleNamespace(
        reduce_bucket_size=100, max_param_reduce_events=2, reduce_and_partition_stream=None, offload_optimizer=False
    )
    run_ahead_of_reductions(optimizer, [partitioned_layer(layer, frozen=10**6) for layer in sizes])
    assert optimizer.max_param_reduce_events == events
    assert optimizer.reduce_and_partition_stream is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ordered_stream_makes_the_current_stream_wait_instead_of_the_host() -> None:
    stream, value = StreamWithoutHostSync("cuda"), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)  # cycles, about half a second
        value.fill_(1)
        written = torch.cuda.Event()
        written.record()
    stream.synchronize()
    result = value.clone()
    assert not written.query()
    assert result.item() == 1

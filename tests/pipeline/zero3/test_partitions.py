"""Gathers and reductions of ZeRO-3 without loops over ranks, against sums by hand and DeepSpeed's own."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss.comm import rank_and_size
from pipeline.zero3.partitions import reduce_scatter_mean
from tests.workers import Workers

SHAPES = {"one, even": [(6, 8)], "one, uneven": [(5, 5)], "several": [(4, 6), (7,), (1,), (2, 3, 5)]}


def gradients(rank: int, ranks: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Return random multiples of `ranks`, so that the mean is exact in any dtype."""
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randint(-9, 10, shape, generator=generator) * ranks).to(dtype) for shape in shapes]


def scattered(group: dist.ProcessGroup, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return reduce_scatter_mean(gradients(*rank_and_size(group), shapes, dtype), group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_reduce_scatter_mean_is_the_partition_of_the_mean(
    workers: Workers, name: str, ranks: int, dtype: torch.dtype
) -> None:
    shapes = SHAPES[name]
    inputs = [gradients(rank, ranks, shapes, torch.float64) for rank in range(ranks)]
    parts = workers.run(scattered, ranks, shapes, dtype)
    for index, per_rank in enumerate(zip(*inputs, strict=True)):
        mean = (torch.stack(per_rank).sum(0) / ranks).flatten()
        width = -(-len(mean) // ranks)
        for rank in range(ranks):
            assert torch.equal(parts[rank][index].double(), mean[rank * width : (rank + 1) * width])

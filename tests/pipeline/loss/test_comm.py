"""Check the sum of hidden-state gradients over ranks, on gloo ranks and simulated for up to 128 of them."""

import pytest
import torch
from torch import Tensor

from pipeline.common.distributed import size_of_equal_runs
from pipeline.loss import LossSettings
from pipeline.loss.chunking import Subchunk
from pipeline.loss.comm import Group, HiddenExchange, rank_and_size, sum_partials
from tests.pipeline.loss.cases import Case, errors, reference_results, sharded_results
from tests.pipeline.loss.test_vocab_parallel import FP64, UNEVEN
from tests.workers import Workers

ROWS, HIDDEN = 40, 64


def partial_gradients(ranks: int) -> Tensor:
    """Draw the [R, rows, d] partial gradients of all ranks in float64."""
    return torch.randn(ranks, ROWS, HIDDEN, generator=torch.Generator().manual_seed(ranks), dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def test_sum_of_partial_gradients_has_the_same_error_on_any_number_of_ranks() -> None:
    """Compare with a ring that rounds at each hop, whose error grows with the number of ranks."""
    summed, ring = {}, {}
    for ranks in (2, 8, 32, 128):
        partials = partial_gradients(ranks)
        expected, rounded = partials.sum(0), partials.bfloat16()
        one_level = sum_partials(rounded.flatten(0, 1), ranks).bfloat16()
        per_node = max(1, ranks // 8)
        nodes = [sum_partials(node.flatten(0, 1), len(node)).bfloat16() for node in rounded.split(per_node)]
        two_levels = sum_partials(torch.cat(nodes), ranks // per_node).bfloat16()
        hops = rounded[0]
        for partial in rounded[1:]:
            hops = hops + partial
        summed[ranks] = relative_error(one_level, expected)
        assert relative_error(two_levels, expected) < 0.0035  # rounded once more
        ring[ranks] = relative_error(hops, expected)
    assert max(summed.values()) < 0.003, summed
    assert ring[128] > 0.01 and ring[128] > 4 * ring[2], ring


def exchange(group: Group, partials: Tensor, counts: list[list[int]], ranks_per_node: int) -> Tensor:
    """Return the gradients of this rank's rows. `counts` lists the rows of each rank, by subchunk."""
    rank, ranks = rank_and_size(group)
    own = sum(count[rank] for count in counts)
    grad = torch.full((own, HIDDEN), torch.nan, dtype=partials.dtype)
    exchange = HiddenExchange(torch.zeros_like(grad), grad, group, True, ranks_per_node)
    starts, nothing = torch.zeros(ranks, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    used = 0
    for count in map(torch.tensor, counts):
        subchunk = Subchunk(starts, count, used, nothing, nothing)
        exchange.reduce(subchunk, partials[rank, subchunk.tokens])
        starts, used = starts + count, used + subchunk.total
    exchange.finish()
    return grad


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(2, 2), (3, 2), (4, 1), (4, 2), (4, 4)])
def test_hidden_exchange_sums_partial_gradients_in_fp32(workers: Workers, ranks: int, ranks_per_node: int) -> None:
    """Use three subchunks, of which the last is empty on some ranks. On four ranks, two of them can form a node."""
    counts = [[5, 3, 0, 7][:ranks], [1, 2, 3, 4][:ranks], [6, 0, 2, 0][:ranks]]
    partials = partial_gradients(ranks)[:, : sum(map(sum, counts))]
    for dtype, bound in ((torch.bfloat16, 0.0035), (torch.float32, 1e-7)):
        parts = workers.run(exchange, ranks, partials.to(dtype), counts, ranks_per_node)
        expected = partials.sum(0).split([n for count in counts for n in count])
        for rank, part in enumerate(parts):
            of_rank = torch.cat([expected[step * ranks + rank] for step in range(len(counts))])
            assert part.dtype == dtype and relative_error(part, of_rank) < bound


@pytest.mark.parametrize("rows", [3, 100])
def test_loss_on_two_nodes_equals_reference(workers: Workers, rows: int) -> None:
    case = Case(UNEVEN, LossSettings(head="vocab_parallel"), dtype=torch.float64).with_rows(rows)
    found = errors(case, workers.run(sharded_results, 4, case, 2), reference_results(case))
    assert all(error <= FP64 for error in found.values()), found


def test_ranks_per_node_requires_equal_consecutive_runs() -> None:
    assert size_of_equal_runs(["a", "a", "b", "b"]) == 2
    assert size_of_equal_runs(["a", "a", "a"]) == 3
    for names in (["a", "b", "a", "b"], ["a", "a", "b"], ["a", "b", "b"], ["a", "a", "b", "b", "a", "a"]):
        assert size_of_equal_runs(names) == 1

"""Check the tensor sizes and the traffic of loss and lookup: nothing of the size of the vocabulary matrix."""

import pytest
import torch

from pipeline.benchmarks.ranks import (
    HIDDEN,
    VOCAB,
    CollectiveCounter,
    crossover_tokens,
    expected_traffic,
    measure_traffic,
)
from pipeline.loss import VocabularyShard, embedding_lookup
from pipeline.loss.comm import Group, rank_and_size
from pipeline.loss.settings import Head
from tests.workers import Workers


@pytest.mark.parametrize("head", ["vocab_parallel", "gathered"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_traffic_equals_formula(workers: Workers, ranks: int, head: Head) -> None:
    tokens = 1024
    for received, _, _ in workers.run(measure_traffic, ranks, tokens, head):
        formula = 0.0 if ranks == 1 else getattr(expected_traffic(ranks, tokens), head)
        assert received == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_of_top_k_equals_formula_exactly(workers: Workers, ranks: int) -> None:
    tokens = 256
    with_top_k, without = (
        workers.run(measure_traffic, ranks, tokens, "vocab_parallel", 1, 1e6, top_k) for top_k in (20, None)
    )
    for (received, _, _), (base, _, _) in zip(with_top_k, without, strict=True):
        assert received - base == expected_traffic(ranks, tokens).selection


def test_traffic_crossing_of_both_heads(workers: Workers) -> None:
    at = crossover_tokens(4)
    for tokens, winner in ((at * 3 // 4 // 64 * 64, "vocab_parallel"), (at * 5 // 4 // 64 * 64, "gathered")):
        received = {
            head: workers.run(measure_traffic, 4, tokens, head)[0][0] for head in ("vocab_parallel", "gathered", "auto")
        }
        assert min(received, key=lambda head: received[head]) == winner
        assert received["auto"] == received[winner]


@pytest.mark.parametrize("head", ["vocab_parallel", "gathered"])
def test_loss_allocates_at_most_a_shard(workers: Workers, head: Head) -> None:
    """Check that with a buffer of 15 rows, the largest tensor in operations and collectives is a shard."""
    for _, largest, _ in workers.run(measure_traffic, 4, 64, head, 1, 15.5 * VOCAB * 4 / 2**20):
        assert largest == VOCAB * HIDDEN // 4


def look_up(group: Group) -> int:
    """Return the number of elements of the largest tensor in a lookup and its backward pass."""
    rank, ranks = rank_and_size(group)
    weight = torch.randn(VOCAB // ranks, HIDDEN)
    shard = VocabularyShard(weight, rank * len(weight), torch.zeros_like(weight))
    with CollectiveCounter() as counter:
        embedding_lookup(torch.randint(0, VOCAB, (500,)), shard, VOCAB, group, 1.0).sum().backward()
    return counter.largest


def test_embedding_lookup_allocates_at_most_a_shard(workers: Workers) -> None:
    assert max(workers.run(look_up, 4)) == VOCAB * HIDDEN // 4


def test_collective_counter_detects_full_matrix() -> None:
    with CollectiveCounter() as counter:
        torch.zeros(VOCAB, HIDDEN)
    assert counter.largest == VOCAB * HIDDEN

"""What the loss and the lookup hold and send: nothing of the size of the vocabulary matrix, and what is counted."""

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
from pipeline.loss.comm import Group, world_of
from pipeline.loss.settings import Head
from tests.workers import Workers


@pytest.mark.parametrize("head", ["vocab_parallel", "gathered"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_received_are_those_of_the_formula(workers: Workers, ranks: int, head: Head) -> None:
    tokens = 1024
    for received, _, _ in workers.run(measure_traffic, ranks, tokens, head):
        formula = 0.0 if ranks == 1 else getattr(expected_traffic(ranks, tokens), head)
        assert received == pytest.approx(formula, rel=0.02)


def test_the_crossing_is_where_the_formula_puts_it(workers: Workers) -> None:
    at = crossover_tokens(4)
    for tokens, winner in ((at * 3 // 4 // 64 * 64, "vocab_parallel"), (at * 5 // 4 // 64 * 64, "gathered")):
        received = {
            head: workers.run(measure_traffic, 4, tokens, head)[0][0] for head in ("vocab_parallel", "gathered", "auto")
        }
        assert min(received, key=lambda head: received[head]) == winner
        assert received["auto"] == received[winner]


@pytest.mark.parametrize("head", ["vocab_parallel", "gathered"])
def test_nothing_of_the_size_of_the_vocabulary_matrix(workers: Workers, head: Head) -> None:
    """With a buffer of 8 rows: the largest tensor, in operations and in collectives, is a shard."""
    for _, largest, _ in workers.run(measure_traffic, 4, 64, head, 1, 8.5 * VOCAB * 4 / 2**20):
        assert largest == VOCAB * HIDDEN // 4


def look_up(group: Group) -> int:
    rank, ranks = world_of(group)
    weight = torch.randn(VOCAB // ranks, HIDDEN)
    shard = VocabularyShard(weight, rank * len(weight), torch.zeros_like(weight))
    with CollectiveCounter(rank, ranks) as counter:
        embedding_lookup(torch.randint(0, VOCAB, (500,)), shard, VOCAB, group, 1.0).sum().backward()
    return counter.largest


def test_the_lookup_holds_shards_and_rows_only(workers: Workers) -> None:
    assert max(workers.run(look_up, 4)) == VOCAB * HIDDEN // 4


def test_the_watch_sees_a_gathered_matrix() -> None:
    with CollectiveCounter(0, 1) as counter:
        torch.zeros(VOCAB, HIDDEN)
    assert counter.largest == VOCAB * HIDDEN

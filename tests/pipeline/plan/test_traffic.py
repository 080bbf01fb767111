"""Estimated communication, against numbers computed by hand."""

from dataclasses import replace

import pytest

from pipeline.plan.traffic import Transfer
from tests.pipeline.plan.cases import prediction_of


def test_between_nodes_by_pattern() -> None:
    ring = Transfer("x", 31.0, 1, 1, "ring", "alone")
    assert ring.between_nodes(8, 8) == 0
    assert ring.between_nodes(32, 8) == pytest.approx(3)  # the parts of 24 of the 31 other ranks through 8 cards
    assert Transfer("x", 31.0, 1, 1, "all-to-all", "alone").between_nodes(32, 8) == pytest.approx(24)


def calls_and_hops(head: str, **loss: object) -> dict[str, tuple[float, float]]:
    """Return (calls, hops) by transfer on 8 GPUs with two micro-steps and one subchunk."""
    prediction = prediction_of("Qwen2.5-0.5B", head=head, **loss)
    assert prediction.run.gradient_accumulation_steps == 2 and prediction.run.chunking.subchunks == 1
    return {t.name: (t.calls, t.hops) for t in prediction.transfers}


def test_hops_of_vocab_parallel_match_hand_count() -> None:
    """On 8 GPUs a collective on a ring has 7 hops, and an all-reduce 14."""
    transfers = calls_and_hops("vocab_parallel")
    assert transfers["persistent parameters"] == (1, 7)
    assert transfers["sums"] == (3, 3 * 14)
    # The layout of both micro-steps; hidden states, statistics and gradients of the subchunk. All-reduces: pooled
    # representations and inner products. All-to-alls: logits of the top-k selection and its results.
    assert transfers["loss"] == (1 + 2 * 7, 7 + 2 * (5 * 7 + 2 * 14))


def test_hops_of_ring_head_match_hand_count() -> None:
    # The layout of both micro-steps. A quarter of 2560 MiB holds two blocks of 7,801 rows of each shard and their
    # gradients, so there are three: each is gathered twice and its gradient reduce-scattered. All-reduces: pooled
    # representations, cross entropy. Two all-to-alls.
    assert calls_and_hops("gathered")["loss"] == (1 + 2 * (9 + 2 + 2), 7 + 2 * (9 * 7 + 2 * 14 + 2 * 7))


def test_node_shards_match_hand_count() -> None:
    """Four nodes of 8 H100s with hpZ, two micro-steps: the loss is that of one node, plus an exchange per step."""
    node, nodes = (prediction_of("Qwen2.5-7B", count, head="gathered") for count in (1, 4))
    assert nodes.run.vocabulary_ranks == 32
    nodes = replace(nodes, run=replace(nodes.run, zero=replace(nodes.run.zero, hpz=8)))
    assert nodes.run.vocabulary_ranks == 8
    before, after = ({t.name: t for t in one.transfers} for one in (node, nodes))
    for name in ("loss", "input embeddings"):
        assert after[name] == before[name] and after[name].between_nodes(32, 8) == 0
    # Weights in bf16 and gradients in fp32 of head and embedding: of four partitions, three are in other nodes.
    exchange, matrices = after["vocabulary shards"], 2 * 152064 * 3584
    assert exchange.between_nodes(32, 8) == pytest.approx(3 * matrices / 32 * (2 + 4))
    assert (exchange.calls, exchange.hops) == (4, 4 * 3)
    assert after["sums"].calls == before["sums"].calls + 2
    memory = nodes.memory
    assert memory.states["vocabulary gradients"] == 4 * matrices / 8 == node.memory.states["vocabulary gradients"]
    assert memory.loss["vocabulary shards"] == 2 * matrices / 8
    assert memory.step["vocabulary gradients of all nodes"] == 4 * matrices / 2 / 8
    # Each parameter of the decoder is gathered from all ranks once per step, and otherwise in its node.
    sizes = sum(-(-size // 32) * 32 for size in nodes.run.secondary_sizes)
    assert after["parameters"].received == pytest.approx(31 / 32 * sizes * 2)
    total = 2 * nodes.run.gathers.gathered_elements(32)
    assert after["parameters within nodes"].received == pytest.approx(7 / 8 * (total - sizes) * 2)
    assert after["parameters within nodes"].between_nodes(32, 8) == 0


def test_hops_of_hidden_state_alignment_match_hand_count() -> None:
    """The pooled hidden states take one gather. Nothing is selected, and no probabilities are exchanged."""
    aligned = {"pooling_tokens": "hidden_states", "distance": "infonce"}
    assert calls_and_hops("vocab_parallel", **aligned)["loss"] == (1 + 2 * 4, 7 + 2 * 4 * 7)
    assert calls_and_hops("gathered", **aligned)["loss"] == (1 + 2 * (9 + 1 + 1), 7 + 2 * (9 * 7 + 14 + 7))

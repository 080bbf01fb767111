"""`head: auto` chooses the head with less predicted time. Bytes decide only if the speeds are unknown."""

from dataclasses import replace

import pytest
import torch

from pipeline.common.hardware import load_device
from pipeline.loss import BYTES_ONLY, ClusterSpeeds, LossSettings
from pipeline.loss.chunking import BufferSizes
from pipeline.loss.head_choice import HEADS, choose_head, traffic
from pipeline.loss.head_time import loss_seconds, ring_between_nodes
from pipeline.loss.layout import GlobalLayout
from pipeline.zero3.cluster_speeds import cluster_speeds
from tests.pipeline.plan.cases import prediction_of

H100 = cluster_speeds(load_device("h100"), "bf16", 8)
SETTINGS = LossSettings(memory_budget_mb=2048)


def uniform_layout(ranks: int, sequences: int, length: int) -> GlobalLayout:
    """Return a layout in which each rank has the same number of sequences, in pairs."""
    count = ranks * sequences
    index = torch.arange(count)
    return GlobalLayout(
        sequence_counts=torch.full((ranks,), sequences),
        lengths=torch.full((count,), length),
        pivot=index // 2 * 2,
        problem_id=index // 2,
        language=index % 2,
        ce_weights=torch.ones(count, dtype=torch.float64),
        values=torch.zeros(0, dtype=torch.int64),
        target_starts=torch.zeros(ranks, dtype=torch.int64),
        weight_starts=None,
        whole_lengths=torch.full((count,), length),
        first_part=None,
    )


@pytest.mark.parametrize(
    ("ranks", "vocab", "hidden", "sequences", "fewer_bytes", "less_time"),
    [
        (8, 152064, 3584, 16, "vocab_parallel", "vocab_parallel"),
        # In a node, the messages of vocab_parallel take less time than its products. The ring head reads all of W.
        (8, 32000, 896, 90, "gathered", "vocab_parallel"),
        # Between nodes, the many small subchunks of vocab_parallel wait for the hops of their collectives.
        (128, 152064, 3584, 16, "vocab_parallel", "gathered"),
        (512, 152064, 3584, 16, "gathered", "gathered"),
    ],
    ids=["node", "node, many tokens", "16 nodes", "64 nodes"],
)
def test_auto_head_minimizes_predicted_time(
    ranks: int, vocab: int, hidden: int, sequences: int, fewer_bytes: str, less_time: str
) -> None:
    layout = uniform_layout(ranks, sequences, 128)
    sizes = BufferSizes(ranks, vocab // ranks, hidden, 2, False, True)
    for speeds, expected in ((BYTES_ONLY, fewer_bytes), (H100, less_time)):
        chosen = choose_head(layout, sizes, SETTINGS, vocab, 20, speeds)
        assert chosen.vocab_parallel == (expected == "vocab_parallel")
        seconds = {}
        for head in HEADS:
            chunks = choose_head(layout, sizes, replace(SETTINGS, head=head), vocab, 20, speeds).chunks
            seconds[head] = loss_seconds(traffic(layout, sizes, SETTINGS, vocab, 20, chunks), head, speeds)
        assert min(seconds, key=lambda head: seconds[head]) == expected, seconds


def test_loss_seconds_match_hand_computation() -> None:
    """The ring head of two nodes of two ranks: one subchunk of 4 tokens per rank, V 16, d 2, fp32, full mixture."""
    layout, sizes = uniform_layout(4, 2, 2), BufferSizes(4, 4, 2, 4, False, False)
    work = traffic(layout, sizes, SETTINGS, 16, None, None)
    calls, sums = 3 + 3 + 1, 2  # two gathers and a reduce-scatter; two all-to-alls; sums
    assert work.collectives("gathered") == (calls, sums)
    assert work.flops("gathered") == 3 * 2 * 4 * 16 * 2
    logits, head, embedding = 6 * 4 * 16 * 4, 16 * 2 * (2 * 4 + 8), 16 * 2 / 4 * 2 * 4
    assert work.memory_bytes("gathered") == logits + head + embedding
    outside = work.gathered * 2 / 3 / 2  # of the three other ranks, two are in the other node; two cards
    assert ring_between_nodes(work.gathered, 4, 2) == outside
    latency = 3 * (calls + sums) + 3 * calls
    slow_links = ClusterSpeeds(flops=1e9, memory=1e9, node=100, network=10, hop=0.5, ranks_per_node=2)
    assert loss_seconds(work, "gathered", slow_links) == pytest.approx(
        max((work.gathered - outside) / 100, outside / 10) + latency / 2
    )
    slow_products = replace(slow_links, flops=0.25, memory=0.5)
    seconds = work.flops("gathered") / 0.25 + work.memory_bytes("gathered") / 0.5
    assert loss_seconds(work, "gathered", slow_products) == pytest.approx(seconds)
    assert loss_seconds(work, "gathered", BYTES_ONLY) == work.gathered


def test_planner_chooses_as_the_loss_does() -> None:
    """Rows of 2,048 target tokens in 16 sequences, as in `uniform_layout`, with 14 pairs instead of 8."""
    for nodes, fewer_bytes, less_time in ((1, *HEADS[:1] * 2), (16, *HEADS), (64, *HEADS[1:] * 2)):
        run = prediction_of("Qwen2.5-7B", nodes, memory_budget_mb=2048).run
        assert run.head == less_time
        assert replace(run, speeds=BYTES_ONLY).head == fewer_bytes

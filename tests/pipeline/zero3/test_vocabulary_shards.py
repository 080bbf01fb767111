"""Each node divides the vocabulary between its ranks: loss and gradients are those of all ranks, and bytes as planned.

Four gloo ranks are 1 x 4, 2 x 2 or 4 x 1 nodes x ranks.
"""

from dataclasses import replace

import pytest
import torch

from pipeline.benchmarks.ranks import HIDDEN, VOCAB, expected_traffic
from pipeline.config.settings import Config, TrainingSettings
from pipeline.loss import LossSettings
from pipeline.loss.settings import Head
from tests.pipeline.loss.cases import Case, errors, metric_errors, reference_results
from tests.pipeline.loss.test_vocab_parallel import FP32, FULL, HEADS, LAYOUTS, SETTINGS
from tests.pipeline.zero3.node_ranks import count_bytes, look_up_twice, node_results
from tests.workers import Workers


def check_nodes(workers: Workers, case: Case, size: int) -> None:
    parts, reference = workers.run(node_results, 4, case, size), reference_results(case)
    relative, metrics = errors(case, parts, reference), metric_errors(parts, reference)
    assert relative.keys() >= {"loss", "hidden", "head", "embedding"}
    assert all(error <= FP32 for error in relative.values()), relative
    assert all(error <= 20 * FP32 for error in metrics.values()), metrics


@pytest.mark.parametrize("size", [1, 2, 4], ids=["4 x 1", "2 x 2", "1 x 4"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_node_shards_match_reference(workers: Workers, name: str, size: int) -> None:
    """The last rank has no entries of the vocabulary, and the one before only some."""
    for head in HEADS:
        for tied in (True, False):
            case = Case(LAYOUTS[name], LossSettings(head=head), tied=tied, vocab_size=29)
            check_nodes(workers, case, size)


@pytest.mark.parametrize("name", [name for name, one in SETTINGS.items() if one.distance != "infonce"])
def test_node_shards_with_all_settings(workers: Workers, name: str) -> None:
    for head in HEADS:
        case = Case(LAYOUTS["uneven"], replace(SETTINGS[name], head=head), tied=False).with_rows(4)
        check_nodes(workers, case, 2)


@pytest.mark.parametrize(
    "extra",
    [{"vocabulary_weights": True}, {"ce_weights": True}, {"bias": True, "logit_scale": 0.25}, {"softcap": 3.0}],
    ids=lambda extra: " ".join(extra),
)
def test_node_shards_with_families_and_weights(workers: Workers, extra: dict[str, object]) -> None:
    for head, loss_settings in ((HEADS[0], LossSettings()), (HEADS[1], FULL)):
        case = Case(LAYOUTS["uneven"], replace(loss_settings, head=head), **extra)  # type: ignore[arg-type]
        check_nodes(workers, case, 2)


def test_node_shards_with_rows_shared_in_a_node(workers: Workers) -> None:
    for head in HEADS:
        check_nodes(workers, Case(LAYOUTS["uneven"][:2], LossSettings(head=head), parts=2).with_rows(3), 2)


@pytest.mark.parametrize("size", [1, 2])
def test_node_shards_follow_updates(workers: Workers, size: int) -> None:
    matrix, gradient = torch.arange(24.0).view(12, 2), torch.zeros(12, 2)
    results = workers.run(look_up_twice, 4, size)
    for rank, (before, after, _) in enumerate(results):
        ids = torch.arange(12).roll(rank)[: 9 + rank]
        gradient[ids] += 1
        assert torch.equal(before, matrix[ids.sort().values]) and torch.equal(after, 2 * before)
    assert torch.equal(torch.cat([part for _, _, part in results]), gradient)


@pytest.mark.parametrize("head", HEADS)
def test_node_shards_receive_planned_bytes(workers: Workers, head: Head) -> None:
    """Two nodes of two: the loss stays in the node. A rank receives two partitions and two gradients of its own one."""
    losses, exchanges = zip(*workers.run(count_bytes, 4, 2, 1024, head), strict=True)
    for received, between_nodes in losses:
        assert received == pytest.approx(getattr(expected_traffic(2, 1024), head), rel=0.02)
        assert between_nodes == 0
    partition = VOCAB // 4 * HIDDEN * (4 + 4)
    # On average, one of two partitions comes from the other node, half a one from the neighbor, and half is its own.
    assert sum(received for received, _ in exchanges) == 4 * 1.5 * partition
    assert sum(between_nodes for _, between_nodes in exchanges) == 4 * partition


@pytest.mark.parametrize(
    ("hpz", "parts", "loss", "expected"),
    [
        (1, 1, LossSettings(), 16),
        (8, 1, LossSettings(), 8),
        (16, 1, LossSettings(), 16),
        (8, 2, LossSettings(), 8),
        (8, 16, LossSettings(), 16),
        (8, 1, LossSettings(distance="infonce"), 16),
        (8, 1, LossSettings(centring=True), 16),
    ],
)
def test_vocabulary_ranks(hpz: int, parts: int, loss: LossSettings, expected: int) -> None:
    """Negatives of InfoNCE and means of languages come from all ranks, and ranks of a row must be in a node."""
    config = Config(loss=loss, training=TrainingSettings(sequence_parallel_size=parts))
    assert config.vocabulary_ranks(16, hpz) == expected

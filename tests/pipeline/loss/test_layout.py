"""Check the exchange of layouts, the division into chunks, pooling weights, and the running means by language."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loss import LayoutExchange, LossBatch, LossSettings, RunningMeans
from pipeline.loss.chunking import AlignmentGroup, schedule
from pipeline.loss.comm import Group, rank_and_size
from tests.pipeline.loss.cases import Case, layout
from tests.pipeline.loss.test_vocab_parallel import EMPTY_SEQUENCES, NOTHING, UNEVEN
from tests.workers import Workers

STEPS = ((NOTHING, EMPTY_SEQUENCES), (UNEVEN, NOTHING), (EMPTY_SEQUENCES, UNEVEN))


def cases_of(step: tuple, ranks: int) -> list[Case]:
    """Return the micro-batches of an optimizer step."""
    return [
        Case(lengths[:ranks], LossSettings(pooling="weights"), seed=i, ce_weights=True)
        for i, lengths in enumerate(step)
    ]


def local_batch(case: Case, rank: int | None) -> tuple:
    return layout(case, rank, torch.Generator().manual_seed(case.seed))


def exchanged(group: Group) -> list[tuple[list[Tensor], list[list[Tensor]]]]:
    """Exchange several optimizer steps. Return numbers for this rank, and the layouts as tensors."""
    rank, ranks = rank_and_size(group)
    exchange, results = LayoutExchange(group), []
    for step in STEPS:
        batches = [local_batch(case, rank)[0] for case in cases_of(step, ranks)]
        counts = 100 * rank + torch.arange(len(batches) * ranks).view(len(batches), ranks)
        layouts, numbers = exchange.exchange(batches, "weights", torch.device("cpu"), counts)
        fields = []
        for one, case in zip(layouts, cases_of(step, ranks), strict=True):
            tokens = [sum(map(sum, groups)) for groups in case.lengths]
            assert one.weight_starts is not None
            targets, weights = (
                torch.cat([one.values[s : s + n] for s, n in zip(starts.tolist(), tokens, strict=True)])
                for starts in (one.target_starts, one.weight_starts)
            )
            table = [one.lengths, one.pivot, one.problem_id, one.language, one.ce_weights]
            fields.append([*table, targets, weights.view(torch.float64)])
        results.append((list(numbers), fields))
    return results


def test_layout_exchange_of_several_micro_batches(workers: Workers) -> None:
    """The sizes grow from step to step, so that the messages of the first steps are too small for the next ones."""
    ranks = 3
    for rank, results in enumerate(workers.run(exchanged, ranks)):
        for (numbers, layouts), step in zip(results, STEPS, strict=True):
            for m, (number, fields, case) in enumerate(zip(numbers, layouts, cases_of(step, ranks), strict=True)):
                assert number.tolist() == [100 * other + m * ranks + rank for other in range(ranks)]
                expected, _ = local_batch(case, None)
                assert expected.ce_weights is not None
                weights = expected.pooling_weights("weights", torch.float64)
                table = [expected.lengths, expected.pivot, expected.problem_id, expected.language, expected.ce_weights]
                for actual, wanted in zip(fields, [*table, expected.targets, weights], strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=1e-15, atol=0)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_schedule_covers_every_target_token_once(data: st.DataObject) -> None:
    """Check sizes, groups and order of the chunks of random sequences."""
    groups = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), max_size=4)
    ranks = data.draw(st.lists(groups, min_size=1, max_size=5))
    rows = data.draw(st.integers(1, 12))
    kind: AlignmentGroup = data.draw(st.sampled_from(["sequence", "pair_group", "all"]))
    lengths = [n for rank in ranks for group in rank for n in group]
    pivot = [
        sum(map(len, flat[:g]))
        for flat in [[g for rank in ranks for g in rank]]
        for g, group in enumerate(flat)
        for _ in group
    ]
    counts = [sum(map(len, rank)) for rank in ranks]
    chunks, order = schedule(*(torch.tensor(x, dtype=torch.int64) for x in (lengths, pivot, counts)), rows, kind)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rank_of = [r for r, count in enumerate(counts) for _ in range(count)]
    seen = [0] * len(lengths)
    done = 0
    for chunk in chunks:
        members = order[chunk.sequences].tolist()
        assert members == sorted(members, key=lambda i: (rank_of[i], i))
        for r in range(len(ranks)):
            assert all(rank_of[i] == r for i in order[chunk.sequences_of_rank(r)].tolist())
        if kind == "pair_group":
            assert all(pivot[i] in members or lengths[i] == 0 for i in members)
        for subchunk in chunk.subchunks:
            assert subchunk.start == done and subchunk.max_count <= rows
            done += subchunk.total
            sizes = subchunk.edges.diff().tolist()
            assert sum(sizes) == subchunk.total
            for i, size, skipped in zip(members, sizes, subchunk.skipped.tolist(), strict=True):
                assert size == 0 or skipped == seen[i]
                seen[i] += size
            for r in range(len(ranks)):
                assert (
                    sum(size for i, size in zip(members, sizes, strict=True) if rank_of[i] == r) == subchunk.counts[r]
                )
        one_group = kind == "all" or len(chunk.subchunks) == 1
        assert one_group or any(lengths[i] > rows or kind == "pair_group" for i in members)
    assert seen == lengths


def test_running_means_of_empty_and_new_languages() -> None:
    means = RunningMeans(torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]), torch.tensor([True, False, True]))
    pooled = torch.tensor([[3.0, 4.0], [7.0, 8.0], [9.0, 9.0], [1.0, 0.0]])
    means.update(pooled, torch.tensor([0, 1, 2, 0]), torch.tensor([True, True, False, True]), 0.75)
    assert means.means.tolist() == [[1.25, 2.0], [7.0, 8.0], [5.0, 6.0]]
    assert means.seen.tolist() == [True, True, True]


def test_pooling_weights_all_zero_use_mean() -> None:
    loss_batch = LossBatch(
        targets=torch.zeros(5, dtype=torch.int64),
        lengths=torch.tensor([2, 3]),
        pivot=torch.tensor([0, 0]),
        problem_id=torch.tensor([0, 0]),
        language=torch.tensor([0, 1]),
        token_weights=torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0]),
    )
    weights = loss_batch.pooling_weights("weights", torch.float64)
    assert weights.tolist() == [0.5, 0.5, 0.25, 0.75, 0.0]

"""The loss on tensors that pretend to be on a GPU: the host must not wait, and all operands must be on the GPU."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.loss import (
    DistinctIds,
    LookupRoute,
    LossSettings,
    VocabularyShard,
    embedding_lookup,
    kernels,
    vocabulary_range,
)
from pipeline.loss.comm import rank_and_size
from pipeline.loss.indexing import ranges, upload
from pipeline.loss.settings import Head
from tests.pipeline.loss.cases import Case, errors, reference_results, sharded_results
from tests.pipeline.loss.pretended_gpu import DEVICE, pretended_gpu, tensors_on_gpu
from tests.pipeline.loss.test_embedding import FACTOR, PADDED, SHAPES, VOCAB, random_inputs
from tests.pipeline.loss.test_gpu_ranks import run_threads
from tests.pipeline.loss.test_vocab_parallel import EMPTY_SEQUENCES, HEADS, NOTHING, SETTINGS, UNEVEN, bound_of

EXCHANGE = "layout.py: on_host = "  # the only wait of several ranks, once per optimizer step
BATCH = "loss_batch.py: return replace"  # the trainer's batches are on the host


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Pretend that there is a GPU, but use the kernels of the CPU."""
    monkeypatch.setattr(kernels, "_use_triton", lambda z: False)
    with pretended_gpu() as recorded:
        yield recorded


def check(case: Case, waits: list[str]) -> None:
    """Compare the loss with the reference, and assert that the host has waited only where it has to."""
    ranks = len(case.lengths)

    def results() -> dict[str, Tensor]:
        with tensors_on_gpu():
            return sharded_results(dist.group.WORLD if ranks > 1 else None, case)

    parts = run_threads(ranks, results) if ranks > 1 else [results()]
    relative = errors(case, parts, reference_results(case))
    assert all(error <= bound_of(case) for error in relative.values()), relative
    expected = (BATCH, EXCHANGE) if ranks > 1 else (BATCH,)
    assert [wait for wait in waits if not wait.startswith(expected)] == []


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_never_waits(name: str, rows: int | None, waits: list[str]) -> None:
    case = Case(UNEVEN[:1], SETTINGS[name], tied=False, device=DEVICE)
    check(case.with_rows(rows) if rows else case, waits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["default", "cold", "full mixture, cold", "hard", "hidden states, infonce", "weights"])
def test_several_ranks_wait_once(name: str, head: Head, waits: list[str]) -> None:
    settings = replace(SETTINGS[name], head=head)
    check(Case(UNEVEN, settings, vocab_size=13, device=DEVICE), waits)  # ranks without a row of the vocabulary


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lengths", [EMPTY_SEQUENCES, NOTHING], ids=["empty sequences", "nothing"])
def test_ranks_without_tokens(lengths: Any, head: Head, waits: list[str]) -> None:
    extra: dict[str, Any] = {"centered": True, "bias": True, "softcap": 3.0, "vocabulary_weights": True}
    check(Case(lengths, LossSettings(head=head), ce_weights=True, device=DEVICE, **extra), waits)


@pytest.mark.parametrize("name", SHAPES)
def test_embedding_lookup_never_waits_if_the_counts_are_known(name: str, waits: list[str]) -> None:
    table, ids, grads = random_inputs(SHAPES[name])  # type: ignore[arg-type]
    distinct = [DistinctIds.of(own) for own in ids]
    counts = torch.stack([own.counts_by_owner(PADDED, len(ids)) for own in distinct])

    def look_up() -> Tensor:
        rank, size = rank_and_size(dist.group.WORLD)
        start, end = vocabulary_range(VOCAB, PADDED, rank, size)
        with tensors_on_gpu():
            weight = table[start:end].to(DEVICE)
            shard = VocabularyShard(weight, start, torch.zeros(weight.shape, dtype=weight.dtype, device=DEVICE))
            on_gpu = DistinctIds(*upload(distinct[rank].tensors(), torch.device(DEVICE)))
            route = LookupRoute(on_gpu, counts[rank].tolist(), counts[:, rank].tolist())
            rows = embedding_lookup(ids[rank].to(DEVICE), shard, PADDED, dist.group.WORLD, FACTOR, route)
            rows.backward(grads[rank].to(DEVICE))
        assert shard.grad is not None
        return shard.grad.data_on_cpu  # type: ignore[attr-defined, no-any-return]

    total = torch.cat(run_threads(len(ids), look_up))
    expected = torch.zeros_like(table)
    for own, grad in zip(ids, grads, strict=True):
        expected.index_add_(0, own.flatten(), grad.flatten(0, -2), alpha=FACTOR)
    torch.testing.assert_close(total, expected)
    assert waits == []


def test_waits_and_operands_on_the_host_are_found(waits: list[str]) -> None:
    lengths = torch.tensor([2, 3])
    with tensors_on_gpu():
        on_gpu = lengths.to(DEVICE)
        assert ranges(on_gpu, on_gpu).data_on_cpu.tolist() == [2, 3, 3, 4, 5]  # type: ignore[attr-defined]
        (uploaded,) = upload([lengths], torch.device(DEVICE))
        with pytest.raises(RuntimeError, match="different devices"):
            uploaded + lengths
        with pytest.raises(RuntimeError, match="different devices"):
            uploaded[torch.tensor([0])]
    assert [wait.partition(" = ")[0] for wait in waits] == ["indexing.py: total"]

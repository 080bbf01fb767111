"""The sharded loss on one GPU, with threads in place of ranks, against the float64 reference on the CPU.

torch's threaded process group passes the tensors of the threads to each other, so the kernels work on shards of the
vocabulary as they do on several GPUs.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg

from pipeline.loss import LossSettings
from tests.pipeline.loss.cases import Case, errors, reference_results, sharded_results
from tests.pipeline.loss.test_gpu import FACTOR_OF_BOUND
from tests.pipeline.loss.test_vocab_parallel import HEADS, ONE_RANK_EMPTY, UNEVEN, bound_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
EIGHT = UNEVEN + ONE_RANK_EMPTY

T = TypeVar("T")


def run_threads(ranks: int, function: Callable[[], T]) -> list[T]:
    """Call a function on `ranks` threads, each of which is a rank of the default process group."""
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group(backend="threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = function()
        except BaseException as error:
            failures.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # the other threads stop waiting

    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()
        multi_threaded_pg.ProcessLocalGroup.reset()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(ranks)]


def results_of(case: Case) -> list[dict[str, torch.Tensor]]:
    return run_threads(len(case.lengths), lambda: sharded_results(dist.group.WORLD, case))


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


# 301 and 1187 * R entries: odd numbers of columns. 48 padded entries of 13: ranks without a row.
SIZES = {
    "2 ranks": (UNEVEN[:2], 301, 302),
    "4 ranks": (UNEVEN, 1187 * 4 - 3, 1187 * 4),
    "8 ranks": (EIGHT, 297 * 8 - 5, 297 * 8),
    "ranks without rows": (UNEVEN, 13, 48),
    "a rank without tokens": (ONE_RANK_EMPTY, 37, 48),
}


@pytest.mark.parametrize("top_k", [20, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_gpu_loss_of_threads(size: str, head: str, top_k: int | None) -> None:
    lengths, vocab_size, padded_size = SIZES[size]
    settings = LossSettings(head=head, top_k=top_k)  # type: ignore[arg-type]
    case = Case(lengths, settings, tied=False, vocab_size=vocab_size, padded_size=padded_size, device=DEVICE)
    relative = errors(case, results_of(case), reference_results(case))
    assert all(error <= FACTOR_OF_BOUND * bound_of(case) for error in relative.values()), relative


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gpu_loss_of_threads_half_precision_no_worse_than_dense(ranks: int) -> None:
    """The gradients of the hidden states are summed over ranks; their error must not grow with the number of ranks."""
    sharded, dense = {}, {}
    for seed in range(5):
        case = Case(EIGHT[:ranks], tied=False, vocab_size=1187, padded_size=1192, hidden_size=32, seed=seed)
        case = replace(case, dtype=torch.bfloat16)
        expected = reference_results(case)
        for total, parts in (
            (sharded, results_of(replace(case, device=DEVICE))),
            (dense, [reference_results(case, torch.bfloat16)]),
        ):
            for name, error in errors(case, parts, expected).items():
                total[name] = total.get(name, 0.0) + error / 5
    assert all(sharded[name] <= 1.1 * dense[name] + 1e-4 for name in sharded), (sharded, dense)

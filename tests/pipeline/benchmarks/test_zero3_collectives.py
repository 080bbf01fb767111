"""Gathers and reductions of ZeRO-3, against DeepSpeed's own: in loops over ranks, persistent parameters one by one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle

from pipeline.benchmarks.common import persistent_parameters_gathered_one_by_one
from pipeline.benchmarks.plan import Case, build_case_engine, random_micro_batches
from pipeline.benchmarks.ranks import CollectiveCounter
from pipeline.common import distributed
from pipeline.training.loop import train_step
from pipeline.training.state import TrainState
from pipeline.zero3.partitions import _wait_per_rank, wait_for_gather
from pipeline.zero3.process_group import start_process_group
from tests.runs import run_forked_ranks

# 64 x 64 elements are not divisible by three ranks.
CASE = Case("deep", layers=3, hidden=64, vocab=1152, accumulation=2, bucket=50_000_000, live=10**9)


@contextmanager
def deepspeeds_own() -> Iterator[None]:
    """Leave DeepSpeed as it is."""
    with (
        persistent_parameters_gathered_one_by_one(),
        mock.patch("pipeline.zero3.engine.avoid_loops_over_ranks"),
        mock.patch.object(AllGatherCoalescedHandle, "wait", _wait_per_rank),
    ):
        yield


def steps(ours: bool) -> tuple[list[float], list[torch.Tensor], int, int]:
    """Return the losses of two steps, this rank's weights after them, the collectives of the last, and the number of
    persistent parameters.
    """
    torch.manual_seed(0)
    with nullcontext() if ours else deepspeeds_own():
        zero, losses = build_case_engine(CASE), []
        zero.set_learning_rate(1e-2)
        for step in range(2):
            batches, normalizers = random_micro_batches(CASE, step)
            with CollectiveCounter() as counter:
                losses += [float(part.loss) for part in train_step(zero, batches, 1.0, normalizers, TrainState(step))]
        assert (AllGatherCoalescedHandle.wait is wait_for_gather) == ours
    weights = [
        p.ds_tensor[: max(p.ds_numel - distributed.rank() * p.ds_tensor.ds_numel, 0)].clone()  # without padding
        for p in zero.ds_engine.module.parameters()
    ]
    persistent = len(zero.ds_engine.optimizer.persistent_parameters)
    zero.ds_engine.destroy()
    return losses, weights, counter.calls, persistent


def run_rank() -> None:
    start_process_group()
    (ours, mine, few, persistent), (theirs, other, many, _) = steps(True), steps(False)
    equal = distributed.all_gather_object([torch.equal(a, b) for a, b in zip(mine, other, strict=True)])
    found = {
        "losses": ours == theirs and len(set(ours)) > 1,
        "weights": sum(not e for part in equal for e in part),
        "saved": many - few,
        "persistent": persistent,
    }
    if distributed.is_main_process():
        print(json.dumps(found), flush=True)
    distributed.shut_down()


@pytest.mark.slow
def test_gathers_and_reductions_match_deepspeeds_own() -> None:
    (found,) = run_forked_ranks(3, ["-m", "tests.pipeline.benchmarks.test_zero3_collectives"])
    assert found["losses"] and found["weights"] == 0, found
    assert found["persistent"] > 10 and found["saved"] == found["persistent"] - 1, found


if __name__ == "__main__":
    run_rank()

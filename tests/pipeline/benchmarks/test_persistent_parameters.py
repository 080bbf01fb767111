"""Persistent parameters gathered together after a step, against DeepSpeed's own one by one."""

import json
from contextlib import nullcontext

import pytest
import torch

from pipeline.benchmarks.common import persistent_parameters_gathered_one_by_one
from pipeline.benchmarks.plan import Case, build_case_engine, random_micro_batches
from pipeline.benchmarks.ranks import CollectiveCounter
from pipeline.common import distributed
from pipeline.training.loop import train_step
from pipeline.training.state import TrainState
from pipeline.zero3.process_group import start_process_group
from tests.runs import run_forked_ranks

CASE = Case("deep", layers=3, hidden=64, vocab=1024, accumulation=2, bucket=50_000_000, live=10**9)


def steps(together: bool) -> tuple[list[float], list[torch.Tensor], int]:
    """Return the losses of two steps, the persistent parameters after them, and the collectives of the last step."""
    torch.manual_seed(0)
    with nullcontext() if together else persistent_parameters_gathered_one_by_one():
        zero, losses = build_case_engine(CASE), []
    zero.set_learning_rate(1e-2)
    for step in range(2):
        batches, normalizers = random_micro_batches(CASE, step)
        with CollectiveCounter() as counter:
            losses += [float(part.loss) for part in train_step(zero, batches, 1.0, normalizers, TrainState(step))]
    persistent = [p.detach().clone() for p in zero.ds_engine.optimizer.persistent_parameters]
    zero.ds_engine.destroy()
    return losses, persistent, counter.calls


def run_rank() -> None:
    start_process_group()
    (ours, mine, few), (theirs, other, many) = steps(True), steps(False)
    found = {
        "losses": ours == theirs and len(set(ours)) > 1,
        "parameters": all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)),
        "saved": many - few,
        "persistent": len(mine),
    }
    if distributed.is_main_process():
        print(json.dumps(found), flush=True)
    distributed.shut_down()


@pytest.mark.slow
def test_gather_together_matches_one_by_one() -> None:
    (found,) = run_forked_ranks(2, ["-m", "tests.pipeline.benchmarks.test_persistent_parameters"])
    assert found["losses"] and found["parameters"], found
    assert found["persistent"] > 10 and found["saved"] == found["persistent"] - 1, found


if __name__ == "__main__":
    run_rank()

"""Errors of the process group that a user can fix. NCCL's is simulated, as it needs a GPU."""

import pytest
import torch
import torch.distributed as dist

from pipeline.common.errors import UserError
from pipeline.zero3 import process_group


@pytest.mark.parametrize(
    ("reason", "kind", "message"),
    [
        (
            "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 17000",
            UserError,
            r"^rank 0 on .*: another rank uses the same GPU; start as many ranks on a node as it has visible GPUs, or",
        ),
        ("Call to ibv_reg_mr failed", dist.DistBackendError, "ibv_reg_mr"),
    ],
)
def test_start_reports_ranks_with_the_same_gpu(
    reason: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce(tensor: torch.Tensor) -> None:
        raise dist.DistBackendError(f"NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage\nLast error:\n{reason}")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group.deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(process_group, "handle_stale_locks", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(kind, match=message) as caught:
        process_group.start_process_group()
    assert kind is not UserError or "\n" not in str(caught.value)

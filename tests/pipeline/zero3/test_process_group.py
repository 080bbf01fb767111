"""Errors of the process group that a user can fix (NCCL's is simulated, as it needs a GPU), and timeouts of groups."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from pipeline.common.errors import UserError
from pipeline.common.launcher import LAUNCHER_VARIABLES
from pipeline.zero3 import process_group
from tests.fork_server import ENVIRONMENT, ROOT

PROGRAM = """
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from pipeline.common.launcher import set_launcher_environment
from pipeline.zero3.process_group import start_process_group

set_launcher_environment()
start_process_group(2000)
for group in (dist.group.WORLD, groups._get_data_parallel_group()):
    print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


@pytest.mark.parametrize("eager", [True, False], ids=["initializing", "first collective"])
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
    reason: str, kind: type[Exception], message: str, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL connects the ranks while the group is initialized if it is bound to a device, as DeepSpeed does."""

    def connect(*_: torch.Tensor, **__: object) -> None:
        raise dist.DistBackendError(f"NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage\nLast error:\n{reason}")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group.deepspeed, "init_distributed", connect if eager else lambda **_: None)
    monkeypatch.setattr(process_group, "handle_stale_locks", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", connect)
    with pytest.raises(kind, match=message) as caught:
        process_group.start_process_group()
    assert kind is not UserError or "\n" not in str(caught.value)


def test_groups_of_deepspeed_have_the_timeout_of_the_run() -> None:
    """The watchdog reports a hang only if torch does not end the process before."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in LAUNCHER_VARIABLES}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["2060.0", "2060.0"]

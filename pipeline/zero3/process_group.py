"""Start the process group that DeepSpeed and the loss share."""

import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from pipeline.common.distributed import local_device
from pipeline.common.errors import UserError
from pipeline.common.launcher import free_port
from pipeline.zero3.op_locks import handle_stale_locks


def start_process_group(timeout: float = 1800) -> None:
    """Initialize the process group of the ranks started by the launcher.

    Args:
        timeout: seconds that the watchdog allows without progress. The timeout of collectives is one minute longer, so
            that the watchdog reports a hang first.

    Raises:
        UserError: another process uses the rendezvous port.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # On CPU ranks, DeepSpeed would compile a shared-memory all-reduce here, which only its inference engine calls.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (mypy does not know the attribute)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        handle_stale_locks()  # the engine builds and loads ops
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed selects the GPU by it
    try:
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout + 60)
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} of this machine is in use, possibly by another run; choose another one, "
            f"for example with deepspeed --master_port {free_port()} or by setting MASTER_PORT"
        ) from None

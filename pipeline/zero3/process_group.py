"""Start the process group that DeepSpeed and the loss share."""

import os
from datetime import timedelta
from functools import partial

import deepspeed
import torch
import torch.distributed as dist

from pipeline.common.distributed import local_device, rank_label, world_size
from pipeline.common.errors import UserError
from pipeline.common.launcher import free_port
from pipeline.zero3.op_locks import handle_stale_locks
from pipeline.zero3.partitions import require_members


def start_process_group(timeout: float = 1800) -> None:
    """Initialize the process group of the ranks started by the launcher.

    Args:
        timeout: seconds that the watchdog allows without progress. The timeout of collectives is one minute longer, so
            that the watchdog reports a hang first. This includes the groups that DeepSpeed creates later.

    Raises:
        UserError: another process uses the rendezvous port, or two ranks the same GPU.
    """
    device, limit = local_device(), timedelta(seconds=timeout + 60)
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
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
        if world_size() > 1:
            # Let the backend connect the ranks, if it would otherwise do so in their first collective.
            dist.all_reduce(torch.zeros(1, device=device))
    except (dist.DistNetworkError, dist.DistBackendError) as error:
        raise _user_error(error) or error from None
    # DeepSpeed gathers weights and reduces gradients in a copy of the default group. It creates its groups with torch's
    # default timeout, which is ten minutes for NCCL; torch then kills the process.
    require_members(deepspeed.comm.comm.cdb, "new_group")
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=limit)


def _user_error(error: Exception) -> UserError | None:
    """Return what the user can do about ranks that cannot connect, or None for another error.

    Only NCCL knows whether ranks that see one GPU each see the same one, and whether they may share it. It connects
    them while the process group is initialized, because DeepSpeed binds the group to the GPU.
    """
    if isinstance(error, dist.DistNetworkError) and "EADDRINUSE" in str(error):
        return UserError(
            f"port {os.environ['MASTER_PORT']} of this machine is in use, possibly by another run; choose another one, "
            f"for example with deepspeed --master_port {free_port()} or by setting MASTER_PORT"
        )
    if "Duplicate GPU" in str(error):
        return UserError(
            f"{rank_label()}: another rank uses the same GPU; start as many ranks on a node as it has visible GPUs, or "
            "give each rank its own, for example with srun --gpus-per-task=1"
        )
    return None

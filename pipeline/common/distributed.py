"""Distributed helpers: ranks, collectives for small Python values and process exit.

Rank and world size come from the launcher's environment variables (`pipeline.common.launcher`), so they are available
before the process group.
"""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipeline.common.errors import AgreedError, UserError
from pipeline.common.exit_codes import exit_now

T = TypeVar("T")
POLL_SECONDS = 5.0  # interval between heartbeats during long work on rank 0


def rank() -> int:
    """Return the global rank of this process, or 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks, or 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is rank 0. Only rank 0 prints and writes shared files."""
    return rank() == 0


def rank_label() -> str:
    """Return this rank and its host, for messages."""
    return f"rank {rank()} on {socket.gethostname()}"


def ranks_per_node() -> int:
    """Return the number of consecutive ranks that share a node. Collective: all ranks must call it."""
    return size_of_equal_runs(all_gather_object(socket.gethostname()))


def size_of_equal_runs(names: list[str]) -> int:
    """Return the length of the runs of equal names, or 1 if lengths differ or a name occurs in several runs."""
    size = names.count(names[0])
    runs = [names[first : first + size] for first in range(0, len(names), size)]
    equal = all(run == [run[0]] * size for run in runs) and len({run[0] for run in runs}) == len(runs)
    return size if equal else 1


def barrier() -> None:
    """Wait for all ranks; do nothing without a process group."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_rank0(work: Callable[[], Any]) -> Any:
    """Call `work` on rank 0 and return its result on all ranks. Collective: all ranks must call it.

    Raises:
        AgreedError: On all ranks, if `work` raises a UserError. It has the same exit status.
    """
    message: list[Any] = [None, None]  # result, (message, exit status) of the error
    if is_main_process():
        try:
            message[0] = work()
        except UserError as error:
            message[1] = (str(error), error.status)
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise AgreedError(*message[1])
    return message[0]


class WorkStopped(Exception):
    """`run_long_on_rank0` was stopped on all ranks."""


def run_long_on_rank0(
    work: Callable[[], Any], heartbeat: Callable[[], None], is_stopping: Callable[[], bool] = lambda: False
) -> Any:
    """Call long-running `work` on rank 0 and return its result on all ranks. Collective: all ranks must call it.

    Unlike in `broadcast_from_rank0`, no collective waits for `work`, so it may take longer than the timeouts of the
    process group and the watchdog.

    Args:
        work: Called on rank 0, in a thread.
        heartbeat: Called on all ranks every few seconds.
        is_stopping: Called on all ranks before `work` begins and every few seconds. If it returns True on any rank,
            `work` is abandoned.

    Raises:
        AgreedError: On all ranks, if `work` raises a UserError.
        WorkStopped: On all ranks, if `work` is abandoned. Its thread continues until the process exits.
    """
    if any(all_gather_object(is_stopping())):
        raise WorkStopped
    thread = ThreadPoolExecutor(1)
    jobs = [thread.submit(work)] if is_main_process() else []
    thread.shutdown(wait=False)
    while not broadcast_from_rank0(lambda: bool(wait(jobs, POLL_SECONDS).done)):
        heartbeat()
        if any(all_gather_object(is_stopping())):
            raise WorkStopped
    return broadcast_from_rank0(lambda: jobs[0].result())


def shut_down(status: int = 0) -> NoReturn:
    """Destroy the process group and exit.

    Normal interpreter shutdown can crash once process groups have been used, so skip it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    exit_now(status)


def local_device() -> torch.device:
    """Return this rank's GPU, or the CPU if DS_ACCELERATOR=cpu or there is no GPU.

    Raises:
        UserError: the node has more ranks than GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1:  # srun --gpus-per-task=1 shows each rank its own GPU only
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"{rank_label()}: its local rank is {local_rank}, but it sees {visible} GPUs; start fewer ranks"
        )
    return torch.device("cuda", local_rank)


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks in float64 (exact for counts below 2^53). Collective: all ranks must call it."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks in rank order. Collective: all ranks must call it.

    The values are pickled, so use it for small values only.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values

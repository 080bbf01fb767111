"""Facts about the ranks of a run, before and after the process group exists."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # of ranks that wait for what rank 0 alone does


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Rank 0: the one that writes and prints."""
    return rank() == 0


def place() -> str:
    """This rank and its host, for messages."""
    return f"rank {rank()} on {socket.gethostname()}"


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Close all process groups; at exit their threads, still running, would at times abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where DS_ACCELERATOR=cpu or there is none."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Exact for counts below 2^53."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; small ones."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank; the others wait for it as long as it takes.

    Raises:
        UserError: on every rank, where rank 0 raised it.
    """
    if not dist.is_initialized():
        return function()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # the usual group would give up after minutes
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    dist.destroy_process_group(group)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]

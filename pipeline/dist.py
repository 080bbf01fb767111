"""Facts about the ranks of a run, before and after the process group exists."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.errors import AgreedError, UserError

T = TypeVar("T")
WAIT_SECONDS = 5.0  # between two signs of life of a long wait for rank 0


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


def from_main(work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, on every rank. Raises AgreedError on all where rank 0 has a UserError."""
    found: list[Any] = [None, None]
    if is_main():
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise AgreedError(found[1])
    return found[0]


def long_work_on_main(work: Callable[[], Any], alive: Callable[[], None]) -> Any:
    """Like `from_main` where the work may outlast any timeout: all ranks call `alive` every few seconds meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        jobs = [thread.submit(work)] if is_main() else []
        while not from_main(lambda: bool(wait(jobs, WAIT_SECONDS).done)):
            alive()
        return from_main(lambda: jobs[0].result())


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

"""Facts about the ranks of a run, before and after the process group exists."""

import os
import re
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipeline.common.errors import AgreedError, UserError

T = TypeVar("T")
WAIT_SECONDS = 5.0  # between two signs of life of a long wait for rank 0


def set_slurm_environment() -> None:
    """Under srun, one task per rank, set the variables that launchers set. Call it first, before any rank is asked for.

    Where a launcher has set them, or outside a step of srun (a batch script's own shell), nothing changes.

    Raises:
        UserError: several ranks, and nobody has said where they meet.
    """
    env = os.environ
    if "RANK" in env or "OMPI_COMM_WORLD_RANK" in env or "SLURM_STEP_NUM_TASKS" not in env:
        return
    ranks = env["SLURM_STEP_NUM_TASKS"]
    if ranks != "1" and ("MASTER_ADDR" not in env or "MASTER_PORT" not in env):
        raise UserError("MASTER_ADDR and MASTER_PORT are not set; start by slurm/train.sh, or set them as it does")
    on_nodes = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # as in 8(x3),4
        for _ in range(int(times or 1))
    ]
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", "0")  # any free one
    env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=ranks)
    env["LOCAL_WORLD_SIZE"] = str(on_nodes[int(env["SLURM_NODEID"])])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Rank 0: the one that writes and prints."""
    return rank() == 0


def rank_label() -> str:
    """This rank and its host, for messages."""
    return f"rank {rank()} on {socket.gethostname()}"


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_rank0(work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, on every rank. Raises AgreedError on all where rank 0 has a UserError."""
    found: list[Any] = [None, None]
    if is_main_process():
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise AgreedError(found[1])
    return found[0]


def run_long_on_rank0(work: Callable[[], Any], alive: Callable[[], None]) -> Any:
    """Like `broadcast_from_rank0` for work that may outlast any timeout; all ranks call `alive` every few seconds."""
    with ThreadPoolExecutor(1) as thread:
        jobs = [thread.submit(work)] if is_main_process() else []
        while not broadcast_from_rank0(lambda: bool(wait(jobs, WAIT_SECONDS).done)):
            alive()
        return broadcast_from_rank0(lambda: jobs[0].result())


def shut_down(status: int = 0) -> NoReturn:
    """End this process, its work done. With process groups in it, the interpreter's own way out at times aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()
    exit_now(status)


def exit_now(status: int) -> NoReturn:
    """End this process without waiting for anything, such as a collective under way."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where DS_ACCELERATOR=cpu or there is none."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Exact for counts below 2^53."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def all_gather_object(value: T) -> list[T]:
    """Every rank's value, on every rank; small ones."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found

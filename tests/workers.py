"""Real gloo ranks for tests: four processes started once, any function run on the first 1 to 4 of them."""

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.common.launcher import free_port

MAX_RANKS = 4


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=MAX_RANKS)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MAX_RANKS + 1)}
    while (job := pipe.recv()) is not None:
        function, size, args = job
        try:
            pipe.send((None, function(groups[size], *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


class Workers:
    """`run(function, size, *args)` calls function(group, *args) on `size` ranks and returns their results."""

    def __init__(self) -> None:
        context, port = mp.get_context("spawn"), free_port()
        pairs = [context.Pipe() for _ in range(MAX_RANKS)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        for pipe in self.pipes[:size]:
            pipe.send((function, size, args))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(120):
                raise TimeoutError(f"rank {rank} did not answer")
            answers.append(pipe.recv())
        for error, _ in answers:
            if error:
                raise AssertionError(error)
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()

"""Real gloo ranks for tests: four processes started once, any function run on the first 1 to 4 of them."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import current_process
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.common.launcher import free_port
from tests.fork_server import ENVIRONMENT, Fork

MAX_RANKS = 4
ANSWER_SECONDS = 120.0


def _serve(address: str, authkey: str, rank: int, port: int) -> None:
    current_process().authkey = bytes.fromhex(authkey)  # tensors are sent as shared memory
    pipe = Client(address)
    pipe.send(rank)
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
        self._start()

    def _start(self) -> None:
        port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        root = Path(self._folder.name)
        with Listener(str(root / "socket")) as listener:
            command = ["-m", "tests.workers", str(listener.address), current_process().authkey.hex()]
            self.processes = [
                Fork([*command, str(rank), str(port)], ENVIRONMENT, root / "log", root / "log")
                for rank in range(MAX_RANKS)
            ]
            connections = [listener.accept() for _ in range(MAX_RANKS)]
        self.pipes = [pipe for _, pipe in sorted((pipe.recv(), pipe) for pipe in connections)]

    def run(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        for pipe in self.pipes[:size]:
            pipe.send((function, size, args))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(ANSWER_SECONDS):
                for process in self.processes:  # a late answer would be taken for that of the next call
                    process.kill()
                self._folder.cleanup()
                self._start()
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
            process.wait(10)
        self._folder.cleanup()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""MPI ranks of preprocessing: mpi4py if a launcher started several processes, otherwise a single rank."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.common.errors import AgreedError, UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL

# Set by Open MPI, MPICH/Hydra and Slurm in every process that they start.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

T = TypeVar("T")


class Ranks:
    """A single rank. Subclasses implement the same interface for several ranks.

    Attributes:
        rank: Rank of this process.
        size: World size.
    """

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order. Collective: all ranks must call it."""
        return [value]

    def all_merge(self, local: dict) -> dict:
        """Return the union of the dictionaries of all ranks. Collective: all ranks must call it."""
        return {key: value for part in self.all_gather(local) for key, value in part.items()}

    def agree(self, work: Callable[[], T]) -> T:
        """Return `work()`. Collective: all ranks must call it.

        If `work` raises UserError on any rank, all ranks raise the error of the lowest such rank.
        """
        try:
            value, error = work(), None
        except UserError as failure:
            value, error = None, str(failure)
        for message in self.all_gather(error):
            if message is not None:
                raise AgreedError(message)
        return value  # type: ignore[return-value]

    def abort(self, status: int) -> None:
        """Terminate all ranks with an exit status."""
        sys.exit(status)


class MpiRanks(Ranks):
    """The ranks of MPI_COMM_WORLD."""

    def __init__(self) -> None:
        from mpi4py import MPI  # initializes MPI, so it is not imported for a single rank

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def all_gather(self, value: Any) -> list[Any]:
        barrier = self._world.Ibarrier()
        while not barrier.Test():
            time.sleep(0.005)  # a blocking MPI call would occupy a core that another rank may need
        return self._world.allgather(value)

    def abort(self, status: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(status)


def start() -> Ranks:
    """Initialize MPI if a launcher started several processes, and return the ranks.

    Raises UserError if MPI does not connect these processes, because each process would then do all the work.
    """
    launched = max(int(os.environ.get(name) or 1) for name in _SIZE_VARIABLES)
    if launched == 1:
        return Ranks()
    ranks = MpiRanks()
    if ranks.size == 1:
        raise UserError(
            f"{launched} processes were launched, but MPI sees one; under Slurm, launch with: srun --mpi=pmix"
        )
    return ranks


def exit_on_signals() -> None:
    """Install handlers for USR1 and TERM that exit immediately with status 75.

    Use this for work that can be interrupted anywhere. Slurm and mpirun send USR1 to every rank.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(STOPPED_BY_SIGNAL))


def run_together(ranks: Ranks, work: Callable[[], None]) -> None:
    """Run `work` on this rank. If it fails, print the error and terminate all ranks, so that none waits forever.

    An AgreedError is raised on all ranks, so only rank 0 prints it.
    """
    if ranks.size == 1:
        work()
        return
    try:
        work()
    except AgreedError:
        if ranks.rank == 0:
            raise
        sys.exit(2)
    except UserError as error:
        print(f"error: rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
        ranks.abort(2)
    except BaseException:
        traceback.print_exc()
        ranks.abort(1)

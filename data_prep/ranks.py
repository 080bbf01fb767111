"""Who we are among the MPI ranks: mpi4py where a launcher started several, else one rank alone."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.common.errors import AgreedError, UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL

# Set by Open MPI, MPICH/Hydra and Slurm for every process they start.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


T = TypeVar("T")


class Ranks:
    """Rank number, number of ranks, and the two collectives that preprocessing needs."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return [value]

    def all_merge(self, mine: dict) -> dict:
        """The union of every rank's dictionary, on every rank."""
        return {key: value for part in self.all_gather(mine) for key, value in part.items()}

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; where it raises UserError on some, raise the lowest such rank's error on all."""
        try:
            value, error = work(), None
        except UserError as failure:
            value, error = None, str(failure)
        for found in self.all_gather(error):
            if found is not None:
                raise AgreedError(found)
        return value  # type: ignore[return-value]

    def abort(self, status: int) -> None:
        """End this process, and with it every other rank."""
        sys.exit(status)


class MpiRanks(Ranks):
    """The ranks of MPI_COMM_WORLD."""

    def __init__(self) -> None:
        from mpi4py import MPI  # starts MPI, so only where a launcher asked for it

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def all_gather(self, value: Any) -> list[Any]:
        everyone_is_here = self._world.Ibarrier()
        while not everyone_is_here.Test():
            time.sleep(0.005)  # where MPI itself would keep the core busy, maybe one that another rank needs
        return self._world.allgather(value)

    def abort(self, status: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(status)


def start() -> Ranks:
    """The ranks this process belongs to.

    Raises UserError where a launcher started several processes that MPI does not connect: each would do all the work.
    """
    launched = max(int(os.environ.get(name) or 1) for name in _SIZE_VARIABLES)
    if launched == 1:
        return Ranks()
    ranks = MpiRanks()
    if ranks.size == 1:
        raise UserError(
            f"{launched} processes were launched, but MPI sees one; under Slurm start with: srun --mpi=pmix"
        )
    return ranks


def end_on_signals() -> None:
    """From here on USR1 and TERM end this process at once with 75. For work that can be killed anywhere.

    Slurm and mpirun send USR1 to every rank.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(STOPPED_BY_SIGNAL))


def run_together(ranks: Ranks, work: Callable[[], None]) -> None:
    """Run `work` on this rank. Where it fails among several ranks, say so and end all of them: none waits for ever.

    What all ranks agree is wrong is told by rank 0 alone.
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

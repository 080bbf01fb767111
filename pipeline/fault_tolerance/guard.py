"""The guard of one run on one rank: takes the lock, keeps watch, and turns whatever ends the run into one status."""

import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch.distributed

from pipeline.common import distributed
from pipeline.common.errors import AgreedError, UserError
from pipeline.common.exit_codes import RANK_FAILURE
from pipeline.fault_tolerance.lock import RunLock
from pipeline.fault_tolerance.restarts import Starts
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.fault_tolerance.watchdog import BEAT_SECONDS, Watchdog, rank_file

WATCH_SECONDS = 6 * BEAT_SECONDS  # how long the holder of a lock may be silent and still count as alive
SPEAK_SECONDS = 2.0  # for the word of a rank that failed to reach the others over a network file system


class Guard:
    """A context for everything from the first collective on. A failure of any rank ends all, in bounded time, with:

    the status of the first rank that failed: 2 for a `UserError`, 1 for a bug, 76 where a rank hangs or is gone; one
    line from that rank. Leaving it in good order releases the lock.

    Args:
        directory: of the run. timeout: seconds without progress that count as a hang. began: of this process.

    Raises:
        UserError: another run uses the directory.
    """

    def __init__(self, directory: Path, stop: StopSignal, timeout: float, began: float) -> None:
        (directory / "ranks").mkdir(parents=True, exist_ok=True)
        self.stop = stop
        self._lock: RunLock | None = None
        token = distributed.broadcast_from_rank0(lambda: self._take_lock(directory))
        self.starts = Starts(directory, began)
        self._watchdog = Watchdog(directory, token, distributed.rank(), distributed.world_size(), timeout)
        self.at = self._watchdog.at

    def _take_lock(self, directory: Path) -> str:
        self._lock = RunLock(directory, rank_file(directory, 0), WATCH_SECONDS)
        (directory / "ranks" / "failed.json").unlink(missing_ok=True)
        return self._lock.token

    def check_lock(self) -> None:
        """Rank 0 before it writes. Raises UserError where another run has taken the directory over."""
        if self._lock is not None and not self._lock.held():
            raise UserError(f"{self._lock.path}: another run has taken this directory; this one ends without saving")

    def __enter__(self) -> "Guard":
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._watchdog.close()
        elif isinstance(error, Exception):
            self._fail(error)
        if self._lock is not None:
            self._lock.release()

    def _fail(self, error: Exception) -> None:
        """End this process with the status of the run's first failure; that one is reported, once."""
        where = distributed.rank_label()
        if isinstance(error, AgreedError):  # names the rank it concerns, if any
            status, line = 2, f"error: {error}"
        elif isinstance(error, UserError):
            status, line = 2, f"error: {where}: {error}" if distributed.world_size() > 1 else f"error: {error}"
        elif is_lost_contact(error):
            status, line = RANK_FAILURE, ""
            time.sleep(SPEAK_SECONDS)
        else:
            status, line = 1, f"error: {where}: {type(error).__name__}: {error}"
        if self._watchdog.claim(status, line or str(error)):
            if not line:
                line = f"error: {where}: lost contact; {self._watchdog.suspects()}; start again to go on"
                self._watchdog.dump_stacks()
            if status == 1:
                traceback.print_exception(error)
            print(line, file=sys.stderr, flush=True)
        else:
            status = (self._watchdog.failure() or {"status": status})["status"]
        if self._lock is not None:
            self._lock.release()
        distributed.exit_now(status)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or late, as gloo and NCCL report it."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "connection closed", "nccl"))

"""Guard a run: hold the lock, run the watchdog, and terminate all ranks with the status of the first failure."""

import contextlib
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch.distributed

from pipeline.common import distributed
from pipeline.common.errors import AgreedError, UserError, storage_errors, tell_job_script, write_error
from pipeline.common.exit_codes import RANK_FAILURE, exit_now
from pipeline.fault_tolerance.lock import RunLock
from pipeline.fault_tolerance.restarts import RestartLog
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.fault_tolerance.watchdog import HEARTBEAT_SECONDS, Watchdog, heartbeat_path

LOCK_WATCH_SECONDS = 6 * HEARTBEAT_SECONDS  # a lock holder without a heartbeat for this long counts as dead
GRACE_SECONDS = 2.0  # for the record of another rank's failure to appear on a network file system


class Guard:
    """Context manager for a run on one rank, entered before the first collective.

    If any rank fails, all ranks exit within a bounded time with the status of the first failure: 2 for a `UserError`,
    77 for a `LossError`, 76 if a rank hung or was lost, 1 for a bug. The failure is printed once, and the lock is
    released.

    Args:
        directory: Output directory of the run.
        stop: Signals received by this process.
        timeout: Seconds without progress after which a rank counts as hung.
        started_at: When this process started, in `time.monotonic()` seconds.

    Attributes:
        stop: Signals received by this process.
        restarts: Log of the run's starts and ends, for rank 0.

    Raises:
        AgreedError: On all ranks, if another run uses the directory.
    """

    def __init__(self, directory: Path, stop: StopSignal, timeout: float, started_at: float) -> None:
        (directory / "ranks").mkdir(parents=True, exist_ok=True)
        self.stop = stop
        self._lock: RunLock | None = None
        token = distributed.broadcast_from_rank0(lambda: self._acquire_lock(directory))
        self.restarts = RestartLog(directory, started_at)
        self._watchdog = Watchdog(directory, token, distributed.rank(), distributed.world_size(), timeout)

    def _acquire_lock(self, directory: Path) -> str:
        with storage_errors(directory, write_error):
            self._lock = RunLock(directory, heartbeat_path(directory, 0), LOCK_WATCH_SECONDS)
            (directory / "ranks" / "failed.json").unlink(missing_ok=True)
        return self._lock.token

    def enter_phase(self, step: int, phase: str, **values: float) -> None:
        """Report progress of the main thread to the watchdog; see `Watchdog.enter_phase`."""
        self._watchdog.enter_phase(step, phase, **values)

    def keep_alive(self) -> None:
        """Report progress of the main thread within a phase."""
        self._watchdog.keep_alive()

    def check_lock(self) -> None:
        """Check on rank 0, before it writes, that this run still holds the lock. Do nothing on other ranks.

        Raises:
            UserError: Another run has taken over the lock.
        """
        if self._lock is not None and not self._lock.keep():
            raise UserError(
                f"{self._lock.path}: another run has taken over this directory, so this run exits without saving; "
                "use another output_dir"
            )

    def __enter__(self) -> "Guard":
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._watchdog.close()
        elif isinstance(error, Exception):
            self._exit_with_failure(error)
        if self._lock is not None:
            self._lock.release()

    def _exit_with_failure(self, error: Exception) -> None:
        """Exit with the status of the first failure of the run. If this failure is the first, print it."""
        label = distributed.rank_label()
        if isinstance(error, AgreedError):  # its message names the rank, if one rank caused it
            status, message = error.status, f"error: {error}"
        elif isinstance(error, UserError):
            prefix = f"error: {label}" if distributed.world_size() > 1 else "error"
            status, message = error.status, f"{prefix}: {error}"
        elif is_lost_contact(error):
            status, message = RANK_FAILURE, ""
            time.sleep(GRACE_SECONDS)
        else:
            status, message = 1, f"error: {label}: {type(error).__name__}: {error}"
        if self._watchdog.record_failure(status, message or str(error)):
            tell_job_script(status)  # NCCL aborts ranks that lose contact with this one, before they read its record
            if not message:
                suspects, advice = self._watchdog.describe_suspects()
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                message = f"error: {label}: lost contact ({reason}); {suspects}; {advice}"
                self._watchdog.dump_stacks()
            with contextlib.suppress(OSError):  # the log may be on a full disk
                if status == 1 and not isinstance(error, AgreedError):  # the rank with the bug printed its traceback
                    traceback.print_exception(error)
                print(message, file=sys.stderr, flush=True)
        else:
            status = (self._watchdog.first_failure() or {"status": status})["status"]
        if self._lock is not None:
            self._lock.release()
        exit_now(status)


def is_lost_contact(error: Exception) -> bool:
    """Return whether an error of gloo or NCCL means that another rank is gone or late."""
    text = str(error).lower()
    if "out of memory" in text:  # of this rank's GPU
        return False
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in text for name in ("gloo", "connection closed", "nccl"))

"""Exceptions for errors that a user can fix. They are printed as one line without traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.common.exit_codes import LOSS_FAILURE, READ_FAILURE, SERVER_FAILURE, USER_ERROR

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A client of a network file system that is evicted or loses its server gets these. A restart may succeed.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT)
USER_ERROR_FILE = "USER_ERROR_FILE"  # variable of slurm/lib.sh: file that a process with a user error creates


class UserError(Exception):
    """Invalid input or settings. The message names the file, row or key, what is wrong, and what to do.

    Attributes:
        status: Exit status of the command.
    """

    status = USER_ERROR


class StorageError(UserError):
    """The file system failed to read or write a file. Unlike after other user errors, a restart may succeed."""

    status = READ_FAILURE


class ServerError(UserError):
    """An inference server has not answered for a long time. A restart resumes once the server is up."""

    status = SERVER_FAILURE


def read_error(path: Path, error: OSError) -> StorageError:
    """Return the StorageError for a failed read of a file or directory."""
    reason = error.strerror or str(error)
    return StorageError(f"cannot read {error.filename or path}: {reason}; check the file system and restart")


def write_error(path: Path, error: OSError) -> UserError:
    """Return the error for a failed write, with the remedy in its message; a StorageError if the cause may pass."""
    remedy = "free disk space" if error.errno in DISK_FULL else "fix the cause"
    kind = StorageError if error.errno in TRANSIENT else UserError
    return kind(f"cannot write {path}: {error.strerror or error}; {remedy} and restart")


@contextlib.contextmanager
def storage_errors(path: Path, convert: Callable[[Path, OSError], UserError] = read_error) -> Iterator[None]:
    """Turn an OSError while `path` is read, or written with `convert=write_error`, into the error of `convert`.

    Raises:
        UserError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise convert(path, error) from error


class AgreedError(UserError):
    """UserError that is raised on all ranks of a run with the same message.

    The ranks have exchanged the error in a collective, so no rank is left waiting for another. It is printed only once.

    Args:
        message: The message.
        status: Exit status, if it differs from that of the class.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = self.status if status is None else status


class LossError(AgreedError):
    """The loss or a gradient is not finite, or the loss has jumped. Retrying the same step gives the same result."""

    status = LOSS_FAILURE


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command-line `main` and exit. A `UserError` is printed as one line on standard error.

    If a rank fails before it is connected to the others, Slurm kills the others, and the job step ends with their exit
    status.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        tell_job_script(error.status)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def tell_job_script(status: int) -> None:
    """Create the file `USER_ERROR_FILE` if a process ends with the status of a user error.

    The job script then knows the cause, although the job step has the exit status of other ranks that were killed.
    """
    if status == USER_ERROR and (file := os.environ.get(USER_ERROR_FILE)):
        with contextlib.suppress(OSError):
            Path(file).touch()


def first_line(error: Exception) -> str:
    """Return the first line of an error message, without a trailing full stop."""
    return str(error).strip().split("\n")[0].rstrip(". ")

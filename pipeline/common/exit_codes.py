"""Exit statuses of all commands, which docs/operations.md explains and slurm/lib.sh acts on, and immediate exit."""

import contextlib
import os
import sys
from typing import NoReturn

USER_ERROR = 2  # bad input, settings or environment: one line on standard error; a restart fails again
SERVER_FAILURE = 69  # EX_UNAVAILABLE of sysexits.h: an inference server is down; restart to resume once it is up
READ_FAILURE = 74  # EX_IOERR of sysexits.h: the file system failed; a restart may succeed
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL of sysexits.h: state saved after USR1 or TERM; restart to resume
RANK_FAILURE = 76  # a rank hung or was lost; restart to resume
LOSS_FAILURE = 77  # the loss or a gradient is not finite, or the loss jumped; a restart would fail again


def exit_now(status: int) -> NoReturn:
    """Exit immediately, without waiting for other threads or collectives in progress."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log may be on a full disk
            stream.flush()
    os._exit(status)

"""Exceptions for errors that a user can fix. They are printed as one line without traceback; the exit status is 2."""

import os
import sys
from collections.abc import Callable

from pipeline.common.exit_codes import USER_ERROR


class UserError(Exception):
    """Invalid input or settings. The message names the file, row or key, what is wrong, and what to do."""


class AgreedError(UserError):
    """UserError that is raised on all ranks of a run with the same message.

    The ranks have exchanged the error in a collective, so no rank is left waiting for another. It is printed only once.
    """


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command-line `main` and exit. A `UserError` is printed as one line on standard error; the status is 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

"""Exceptions for mistakes that a user can fix: printed as one line, exit status 2, no traceback."""

import os
import sys
from collections.abc import Callable

from pipeline.common.exit_codes import USER_ERROR


class UserError(Exception):
    """Bad input or settings. The message names the file, row or key, says what is wrong and what to do."""


class AgreedError(UserError):
    """A UserError raised on all ranks and printed once."""


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command-line `main` and exit; a `UserError` gives status 2 and one line on standard error."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

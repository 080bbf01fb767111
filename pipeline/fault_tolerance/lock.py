"""Lock an output directory for one run. Stale locks are detected without comparing the clocks of hosts."""

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import read_json_or_none
from pipeline.common.errors import UserError

LOCK = "lock.json"
SETTLE_SECONDS = 1.0  # delay to detect that two runs replaced the same stale lock; the last write wins


class RunLock:
    """Lock on a run's output directory, held from construction until `release`.

    Args:
        directory: Output directory.
        heartbeat: File that a live holder rewrites every few seconds.
        watch_seconds: Seconds without a change of that file after which the holder counts as dead.

    Attributes:
        path: The lock file.
        token: Random id of this process start.

    Raises:
        UserError: Another live run holds the lock, or has just replaced the same stale lock.
    """

    def __init__(self, directory: Path, heartbeat: Path, watch_seconds: float) -> None:
        self.path = directory / LOCK
        self.token = uuid.uuid4().hex
        self._owner = {
            "token": self.token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        content = json.dumps(self._owner).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            holder = self._read_holder()
            if holder is not None and not self._is_dead(holder) and content_changes(heartbeat, watch_seconds):
                raise UserError(
                    f"{directory}: in use by {_describe(holder)}; stop it or use another output_dir"
                ) from None
            self._replace_stale(content)
            return
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)

    def _read_holder(self) -> dict[str, Any] | None:
        """Return the content of the lock file. Another run may have created the file but not written it yet."""
        if (holder := read_json_or_none(self.path)) is None:
            time.sleep(SETTLE_SECONDS)
            holder = read_json_or_none(self.path)
        return holder

    def _replace_stale(self, content: bytes) -> None:
        temporary = self.path.with_suffix(f".{self.token}")
        temporary.write_bytes(content)
        os.replace(temporary, self.path)
        time.sleep(SETTLE_SECONDS)
        if not self.is_held():
            winner = _describe(read_json_or_none(self.path) or {})
            raise UserError(f"{self.path.parent}: just taken by {winner}; use another output_dir") from None

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Return whether a holder has ended: a vanished process of this host, or an earlier start of this Slurm job.

        A Slurm job is assumed to start one run at a time.
        """
        if self._owner["job"] and holder.get("job") == self._owner["job"]:
            return True
        if holder.get("host") != self._owner["host"] or holder.get("job"):
            return False
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except (KeyError, ValueError, PermissionError):
            return False
        return False

    def is_held(self) -> bool:
        """Return whether the lock file still names this run."""
        holder = read_json_or_none(self.path)
        return holder is not None and holder.get("token") == self.token

    def keep(self) -> bool:
        """Return whether no other run has taken the lock. A lock file that was deleted is written again.

        A file that cannot be read for the moment does not count as taken.
        """
        with contextlib.suppress(OSError):
            if not self.path.exists():
                self.path.write_bytes(json.dumps(self._owner).encode())
        holder = read_json_or_none(self.path)
        return holder is None or holder.get("token") == self.token

    def release(self) -> None:
        """Delete the lock file, unless another run has taken the lock."""
        if self.is_held():
            self.path.unlink(missing_ok=True)


def content_changes(path: Path, watch_seconds: float) -> bool:
    """Watch a file for up to `watch_seconds` and return whether its content changes."""
    before = _content(path)
    deadline = time.monotonic() + watch_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, watch_seconds / 10))
        if _content(path) != before:
            return True
    return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _describe(holder: dict[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"

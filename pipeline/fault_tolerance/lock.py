"""One run per output directory: lock.json names the holder; a stale one is found out without comparing clocks."""

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

LOCK = "lock.json"
SETTLE_SECONDS = 1.0  # two that take over the same stale lock: the later one's content stands


class RunLock:
    """Held from construction to `release`. `token` tells this start of the run from every other.

    Args:
        sign_of_life: a file that a living holder rewrites often. watch_s: how long to look at it for a change.

    Raises:
        UserError: another run holds the directory and is alive.
    """

    def __init__(self, directory: Path, sign_of_life: Path, watch_s: float) -> None:
        self.path = directory / LOCK
        self.token = uuid.uuid4().hex
        self._mine = {
            "token": self.token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        content = json.dumps(self._mine).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            holder = _read(self.path)
            if holder is not None and not self._is_dead(holder) and changes(sign_of_life, watch_s):
                raise UserError(
                    f"{directory}: in use by {_describe(holder)}; end it or use another output_dir"
                ) from None
            mine = self.path.with_suffix(f".{self.token}")
            mine.write_bytes(content)
            os.replace(mine, self.path)
            time.sleep(SETTLE_SECONDS)
            if not self.held():
                winner = _describe(_read(self.path) or {})
                raise UserError(f"{directory}: just taken by {winner}; use another output_dir") from None
            return
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Known without waiting: an earlier start of this Slurm job, or a process of this host that is gone."""
        if self._mine["job"] and holder.get("job") == self._mine["job"]:
            return True
        if holder.get("host") != self._mine["host"] or holder.get("job"):
            return False
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except (KeyError, ValueError, PermissionError):
            return False
        return False

    def held(self) -> bool:
        """Whether the lock is still this run's."""
        found = _read(self.path)
        return found is not None and found.get("token") == self.token

    def release(self) -> None:
        if self.held():
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """None where it is gone or cut short."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def changes(path: Path, watch_s: float) -> bool:
    """Whether a file's content changes while we look."""
    before = _content(path)
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, watch_s / 10))
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

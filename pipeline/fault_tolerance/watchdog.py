"""A thread per rank that shows the rank is alive, watches the next rank, and ends a run that hangs or has lost a rank.

RUN/ranks/rank-RRRRR.json         rewritten every few seconds: how often so far, and where the rank is
RUN/ranks/rank-RRRRR.stacks.txt   the stacks of all threads, when the run had to be ended
RUN/ranks/failed.json             the first rank to fail says why; all others end with its status

Hosts' clocks are never compared: a rank is silent if its file does not change while another looks. Rank r watches
rank r + 1, so the load on the file system does not grow with the square of the ranks.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.common.distributed import exit_now
from pipeline.common.exit_codes import RANK_FAILURE

BEAT_SECONDS = 5.0
LEAVE_SECONDS = 20.0  # for the first rank to fail to say why, and for the others' main threads to end by themselves
MAX_SILENCE_SECONDS = 180.0  # longer than any file system or C++ call should hold up a thread


def rank_file(directory: Path, rank: int) -> Path:
    """Where a rank of the run in `directory` shows that it is alive."""
    return directory / "ranks" / f"rank-{rank:05d}.json"


class Watchdog:
    """Watches from `start` to `close`.

    Args:
        token: of this start of the run; files of earlier ones are not heeded.
        timeout: seconds without progress of this rank's main thread that count as a hang.
    """

    def __init__(self, directory: Path, token: str, rank: int, ranks: int, timeout: float) -> None:
        self.directory, self.token, self.rank, self.ranks, self.timeout = directory, token, rank, ranks, timeout
        self.silence = min(MAX_SILENCE_SECONDS, timeout)
        self.host = socket.gethostname()
        self._at: tuple[int, str, float] = (0, "starting", time.monotonic())
        self._figures: dict[str, float] = {}
        self._beats = 0
        self._speaking = False  # this rank was the first to fail, and is finding out why
        self._next_seen: tuple[int, float] = (-1, time.monotonic())  # the next rank's beats, and when they changed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def at(self, step: int, phase: str, **figures: float) -> None:
        """The main thread has come this far. Costs nothing: the thread writes it down when it next wakes."""
        self._at = (step, phase, time.monotonic())
        if figures:
            self._figures = figures

    def close(self) -> None:
        """Leave in good order."""
        self._stop.set()
        self._thread.join()
        self.at(self._at[0], "done")
        self._beat()

    def claim(self, status: int, message: str) -> bool:
        """Say why the run fails. False where another rank was first; its `failure` then counts."""
        self._at = (self._at[0], "failed", time.monotonic())
        content = {"token": self.token, "rank": self.rank, "host": self.host, "status": status, "message": message}
        path = self.directory / "ranks" / "failed.json"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError:  # there already, or the disk is full or gone: then everyone speaks for itself
            time.sleep(1)  # ranks that fail together: who made the file may not have filled it yet
            return self.failure() is None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content))
        self._speaking = True
        return True

    def failure(self) -> dict[str, Any] | None:
        """What the first rank to fail said, if one did."""
        return self._read(self.directory / "ranks" / "failed.json")

    def suspects(self) -> str:
        """Who holds the others up: ranks that give no sign while we look, else those that are behind. Takes seconds."""
        before = self._everyone()
        time.sleep(2.2 * BEAT_SECONDS)
        after = self._everyone()
        silent = [r for r in range(self.ranks) if r != self.rank and before.get(r) == after.get(r)]
        if silent:
            return "; ".join(f"{self._name(r, after)} gives no sign of life" for r in silent[:4]) + _more(silent)
        first = min((found["step"] for found in after.values()), default=0)
        places = {r: f"step {found['step']} ({found['phase']})" for r, found in after.items()}
        common = max(places.values(), key=list(places.values()).count, default="")
        behind = [r for r, found in after.items() if found["step"] == first and places[r] != common]
        if behind:
            return "; ".join(f"{self._name(r, after)} is at {places[r]}" for r in behind[:4]) + _more(behind)
        return f"all ranks are alive, at {common}"

    def dump_stacks(self) -> None:
        """Write where all threads of this process are."""
        path = rank_file(self.directory, self.rank).with_suffix(".stacks.txt")
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {self.host}, step {self._at[0]}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _run(self) -> None:
        leave_at = float("inf")
        while not self._stop.wait(BEAT_SECONDS):
            self._beat()
            failure = self.failure()
            if failure is not None and not self._speaking:
                if leave_at == float("inf"):
                    leave_at = time.monotonic() + LEAVE_SECONDS
                    self.dump_stacks()
                if time.monotonic() > leave_at:
                    exit_now(failure["status"])
                continue
            step, phase, since = self._at
            if phase == "failed":
                continue
            if time.monotonic() - since > self.timeout:
                self._end(f"no progress for {self.timeout:.0f} s at step {step} ({phase})")
            elif self._next_is_silent():
                self._end(f"a rank gave no sign of life for {self.silence:.0f} s at step {step} ({phase})")

    def _end(self, what: str) -> None:
        """Stop the run from this thread: the main thread is stuck, or soon will be."""
        if not self.claim(RANK_FAILURE, what):
            return
        self._beat()
        why, where = self.suspects(), self.directory / "ranks"
        line = f"error: rank {self.rank} on {self.host}: {what}; {why}; stacks in {where}; start again to go on"
        print(line, file=sys.stderr, flush=True)
        self.dump_stacks()
        exit_now(RANK_FAILURE)

    def _next_is_silent(self) -> bool:
        if self.ranks == 1:
            return False
        found = self._read(rank_file(self.directory, (self.rank + 1) % self.ranks)) or {"beats": -1, "phase": ""}
        if found["beats"] != self._next_seen[0] or found["phase"] == "done":
            self._next_seen = (found["beats"], time.monotonic())
        return time.monotonic() - self._next_seen[1] > self.silence

    def _beat(self) -> None:
        self._beats += 1
        step, phase, _ = self._at
        content = {
            "token": self.token,
            "host": self.host,
            "pid": os.getpid(),
            "beats": self._beats,
            "step": step,
            "phase": phase,
            **self._figures,
        }
        path = rank_file(self.directory, self.rank)
        try:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            pass  # a full disk ends the run where it saves, with a message; silence here would blame this rank

    def _everyone(self) -> dict[int, dict[str, Any]]:
        found = {r: self._read(rank_file(self.directory, r)) for r in range(self.ranks)}
        return {r: content for r, content in found.items() if content is not None}

    def _name(self, rank: int, found: dict[int, dict[str, Any]]) -> str:
        return f"rank {rank} on {found[rank]['host']}" if rank in found else f"rank {rank}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A file of this start of the run; None where it is missing, cut short or of another start."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("token") == self.token else None


def _more(ranks: list[int]) -> str:
    return f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""

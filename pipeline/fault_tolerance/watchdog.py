"""Watchdog thread: on each rank, writes heartbeats, and terminates the run if it hangs or loses a rank.

RUN/ranks/rank-RRRRR.json         heartbeat, rewritten every few seconds: a counter, and the rank's step and phase
RUN/ranks/rank-RRRRR.stacks.txt   stacks of all threads, if the watchdog terminated the run
RUN/ranks/failed.json             the first failure; all other ranks exit with its status

Clocks of different hosts are never compared. A rank is unresponsive if its heartbeat file does not change while another
rank watches it. Rank r only watches rank r + 1, so the file system load grows linearly with the number of ranks.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import read_json_or_none, write_atomically
from pipeline.common.exit_codes import RANK_FAILURE, exit_now
from pipeline.common.memory import count_oom_kills

HEARTBEAT_SECONDS = 5.0
EXIT_GRACE_SECONDS = 20.0  # for the first failed rank to report, and for the main threads of other ranks to exit
MAX_SILENCE_SECONDS = 180.0  # longer than any file system or C++ call should block a thread
MAX_STALL_SECONDS = 30.0  # between two heartbeats; after a longer stall, silence is counted anew
FAILED = "failed"  # phase of a rank that ends because of an error
WAITING = "waiting for all ranks to begin"  # phase in which a rank waits for slower ones
RESTART_ADVICE = "restart to resume"
MEMORY_ADVICE = (
    "request more host memory, use fewer ranks per node, or set training.save_in_background to false, and restart to "
    "resume"
)


def heartbeat_path(directory: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank of the run in `directory`."""
    return directory / "ranks" / f"rank-{rank:05d}.json"


class Watchdog:
    """Watchdog of one rank, active from `start` to `close`.

    Args:
        directory: Output directory of the run.
        token: Random id of this start of the run. Files of earlier starts are ignored.
        rank: This rank.
        ranks: World size.
        timeout: Seconds without progress of the main thread after which this rank counts as hung.
    """

    def __init__(self, directory: Path, token: str, rank: int, ranks: int, timeout: float) -> None:
        self.directory, self.token, self.rank, self.ranks, self.timeout = directory, token, rank, ranks, timeout
        self.max_silence = min(MAX_SILENCE_SECONDS, timeout)
        self.host = socket.gethostname()
        self._progress: tuple[int, str, float] = (0, "starting", time.monotonic())  # step, phase, since when
        self._values: dict[str, float] = {}
        self._heartbeats, self._writing = 0, threading.Lock()
        self._oom_kills = count_oom_kills()  # before this start of the run
        self._is_first_failure = False
        self._next_rank_beats, self._next_rank_changed_at = -1, time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat and start the thread."""
        self.write_heartbeat()
        self._thread.start()

    def enter_phase(self, step: int, phase: str, **values: float) -> None:
        """Report progress of the main thread. This only sets attributes. The watchdog thread writes them to disk.

        Args:
            step: Optimizer step, counted from 1.
            phase: What the main thread does next, for messages.
            **values: Numbers to publish in the heartbeat file.
        """
        self._progress = (step, phase, time.monotonic())
        if values:
            self._values = values

    def keep_alive(self) -> None:
        """Report progress of the main thread within a phase."""
        step, phase, _ = self._progress
        self._progress = (step, phase, time.monotonic())

    def close(self) -> None:
        """Stop the thread and mark this rank as done."""
        self._closed.set()
        self._thread.join()
        self.enter_phase(self._progress[0], "done")
        self.write_heartbeat()

    def record_failure(self, status: int, message: str) -> bool:
        """Record the first failure of the run.

        Args:
            status: Exit status for all ranks.
            message: One-line description of the failure.

        Returns:
            False if another rank has failed first; `first_failure` returns its record.
        """
        self._progress = (self._progress[0], FAILED, time.monotonic())
        self.write_heartbeat()  # so that this rank does not count as silent once it has exited
        content = {"token": self.token, "rank": self.rank, "host": self.host, "status": status, "message": message}
        path = self.directory / "ranks" / "failed.json"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError:
            # Another rank was first, or the file system is unusable; then every rank reports its own failure.
            time.sleep(1)  # another rank may have created the file but not written it yet
            return self.first_failure() is None
        # On a full disk the file stays empty, and every rank reports its own failure.
        with contextlib.suppress(OSError), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content))
        self._is_first_failure = True
        return True

    def first_failure(self) -> dict[str, Any] | None:
        """Return the record of the first failure, or None if no rank has failed."""
        return self._read(self.directory / "ranks" / "failed.json")

    def describe_suspects(self) -> tuple[str, str]:
        """Describe the unresponsive ranks or, if there are none, the slow ones, or those that have failed too.

        A silent rank counts as killed for lack of memory if the kernel has killed a process on its host since the start
        of the run, as other ranks of the host report. Blocks for about two heartbeat intervals.

        Returns:
            A description of the ranks, with their hosts and, if they are slow, their steps; and what to do.
        """
        before = self._read_heartbeats()
        time.sleep(2.2 * HEARTBEAT_SECONDS)
        after = self._read_heartbeats()
        ended = {r for r, heartbeat in after.items() if heartbeat["phase"] == "done"}
        others = [r for r in range(self.ranks) if r != self.rank and r not in ended]
        failed = [r for r in others if r in after and after[r]["phase"] == FAILED]
        silent = [r for r in others if r not in failed and before.get(r) == after.get(r)]
        if silent:
            short_of_memory = {beat["host"] for r, beat in after.items() if r not in silent and beat["oom_kills"]}
            killed = {r for r in silent if r in after and after[r]["host"] in short_of_memory}
            reasons = ("sends no heartbeat", "was probably killed by the kernel for lack of host memory")
            descriptions = [f"{_rank_label(r, after)} {reasons[r in killed]}" for r in silent]
            return _join(descriptions), MEMORY_ADVICE if killed else RESTART_ADVICE
        running = {r: heartbeat for r, heartbeat in after.items() if r not in ended and r not in failed}
        lowest_step = min((heartbeat["step"] for heartbeat in running.values()), default=0)
        positions = {r: f"step {heartbeat['step']} ({heartbeat['phase']})" for r, heartbeat in running.items()}
        # Most ranks wait for the slow ones. On a tie, those that say so are not the slow ones.
        counts = Counter(positions.values())
        common = max(counts, key=lambda position: (counts[position], WAITING in position), default="")
        slow = [r for r, beat in running.items() if beat["step"] == lowest_step and positions[r] != common]
        if slow:
            return _join([f"{_rank_label(r, after)} is at {positions[r]}" for r in slow]), RESTART_ADVICE
        if failed:
            return _join([f"{_rank_label(r, after)} has failed" for r in failed]), RESTART_ADVICE
        return f"all ranks are alive, at {', '.join(counts)}", RESTART_ADVICE

    def dump_stacks(self) -> None:
        """Write the stacks of all threads to a file, or to standard error if it cannot be written."""
        path = heartbeat_path(self.directory, self.rank).with_suffix(".stacks.txt")
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {self.host}, step {self._progress[0]}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def write_heartbeat(self) -> None:
        """Write this rank's heartbeat file. The thread does so every few seconds."""
        with self._writing:
            self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        self._heartbeats += 1
        step, phase, _ = self._progress
        content = {
            "token": self.token,
            "host": self.host,
            "pid": os.getpid(),
            "beats": self._heartbeats,
            "step": step,
            "phase": phase,
            "oom_kills": count_oom_kills() - self._oom_kills,
            **self._values,
        }
        path, text = heartbeat_path(self.directory, self.rank), json.dumps(content)
        try:
            write_atomically(path, text, durable=False)
        except OSError:
            # The next save reports a full disk. Until then this rank must not count as silent: overwriting the file
            # takes no more space.
            with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

    def _run(self) -> None:
        exit_at, previous = float("inf"), time.monotonic()
        while not self._closed.wait(HEARTBEAT_SECONDS):
            self.write_heartbeat()
            failure = self.first_failure()
            # If the file system blocked this thread, or the job was suspended, the next rank was probably silent too.
            now = time.monotonic()
            if now - previous > MAX_STALL_SECONDS:
                self._next_rank_changed_at = now
            previous = now
            if failure is not None and not self._is_first_failure:
                if exit_at == float("inf"):
                    exit_at = time.monotonic() + EXIT_GRACE_SECONDS
                    self.dump_stacks()
                if time.monotonic() > exit_at:
                    exit_now(failure["status"])
                continue
            step, phase, since = self._progress
            if phase == FAILED:
                continue
            if time.monotonic() - since > self.timeout:
                self._end_run(f"no progress for {self.timeout:.0f} s at step {step} ({phase})")
            elif self._next_rank_is_silent():
                silent = (self.rank + 1) % self.ranks
                where = f"rank {self.rank} is at step {step} ({phase})"
                self._end_run(f"rank {silent} sent no heartbeat for {self.max_silence:.0f} s; {where}")

    def _end_run(self, reason: str) -> None:
        """Record the failure, print it and exit, because the main thread hangs, or will hang in its next collective.

        Return if another rank has failed first; its message is then the one to print.
        """
        if not self.record_failure(RANK_FAILURE, reason):
            return
        (suspects, advice), stacks = self.describe_suspects(), self.directory / "ranks"
        label = f"rank {self.rank} on {self.host}"
        message = f"error: {label}: {reason}; {suspects}; stacks in {stacks}; {advice}"
        with contextlib.suppress(OSError):  # the log may be on a full disk
            print(message, file=sys.stderr, flush=True)
        self.dump_stacks()
        exit_now(RANK_FAILURE)

    def _next_rank_is_silent(self) -> bool:
        if self.ranks == 1:
            return False
        path = heartbeat_path(self.directory, (self.rank + 1) % self.ranks)
        heartbeat = self._read(path) or {"beats": -1, "phase": ""}
        if heartbeat["beats"] != self._next_rank_beats or heartbeat["phase"] == "done":
            self._next_rank_beats, self._next_rank_changed_at = heartbeat["beats"], time.monotonic()
        return time.monotonic() - self._next_rank_changed_at > self.max_silence

    def _read_heartbeats(self) -> dict[int, dict[str, Any]]:
        """Return the heartbeats of all ranks that have written one since this start of the run."""
        heartbeats = {r: self._read(heartbeat_path(self.directory, r)) for r in range(self.ranks)}
        return {r: heartbeat for r, heartbeat in heartbeats.items() if heartbeat is not None}

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return the content of a JSON file, or None if it is missing, truncated or from another start of the run."""
        content = read_json_or_none(path)
        return content if content is not None and content.get("token") == self.token else None


def _rank_label(rank: int, heartbeats: dict[int, dict[str, Any]]) -> str:
    return f"rank {rank} on {heartbeats[rank]['host']}" if rank in heartbeats else f"rank {rank}"


def _join(descriptions: list[str], limit: int = 4) -> str:
    """Join the first few descriptions and count the rest."""
    more = f" and {len(descriptions) - limit} more" if len(descriptions) > limit else ""
    return "; ".join(descriptions[:limit]) + more

"""Record the starts and ends of a run in RUN/starts.jsonl, and stop a Slurm job in a crash loop."""

import contextlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError, storage_errors, write_error
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL

MAX_STARTS_WITHOUT_PROGRESS = 3
MAX_STOPS_WITHOUT_PROGRESS = 20  # more, because a job may be preempted while it loads its model
FAILED_STARTS_FILE = "FAILED_STARTS_FILE"  # variable of slurm/lib.sh: file that counts starts that were not recorded


class RestartLog:
    """Log of a run's starts and ends, written by rank 0.

    Args:
        directory: Output directory of the run.
        started_at: When this process started, in `time.monotonic()` seconds.
    """

    def __init__(self, directory: Path, started_at: float) -> None:
        self.path, self.started_at = directory / "starts.jsonl", started_at

    def record_start(self, step: int, max_steps: int, ranks: int, **changes: Any) -> None:
        """Record a start that resumes from `step` (0 for a new run).

        Args:
            step: Number of finished optimizer steps.
            max_steps: Last step of the run.
            ranks: The world size.
            changes: Anything that differs from the checkpoint, as JSON values.

        Raises:
            UserError: This Slurm job is in a crash loop: it has failed three times after starting from the same step,
                or twenty signals in a row have stopped it at this step.
        """
        job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        events = read_restart_log(self.path.parent)
        failures = count_failed_starts(events, job, restart, step) if job else 0
        if failures >= MAX_STARTS_WITHOUT_PROGRESS:
            raise UserError(
                f"{self.path.parent}: job {job} failed {MAX_STARTS_WITHOUT_PROGRESS} times without getting past step "
                f"{step}; fix the cause shown in its log and submit it again"
            )
        if job and count_idle_stops(events, job, step) >= MAX_STOPS_WITHOUT_PROGRESS:
            raise UserError(
                f"{self.path.parent}: signals stopped job {job} {MAX_STOPS_WITHOUT_PROGRESS} times without getting "
                f"past step {step}; submit it again with a longer --time"
            )
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        start = {"job": job, "restart": restart, "nodes": nodes, "ranks": ranks, "step": step, "max_steps": max_steps}
        self._append(event="start", **start, **changes)
        if file := os.environ.get(FAILED_STARTS_FILE):
            with contextlib.suppress(OSError):
                Path(file).unlink(missing_ok=True)

    def record_first_step(self, step: int) -> None:
        """Record that the first optimizer step of this start is done, with the seconds since the process started."""
        self._append(event="first step", step=step, seconds=round(time.monotonic() - self.started_at, 2))

    def record_end(
        self, step: int, status: int, seconds_since_signal: float | None, stopped_early: bool = False
    ) -> None:
        """Record a normal exit: whether early stopping caused it, and the seconds since a signal if that caused it."""
        end = {"step": step, "status": status, "seconds_since_signal": seconds_since_signal}
        self._append(event="end", **end, stopped_early=stopped_early)

    def _append(self, **event: Any) -> None:
        """Append an event, on a line of its own even if the last line is truncated.

        Raises:
            UserError: The log cannot be written.
        """
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event})
        with storage_errors(self.path, write_error), open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())


def read_restart_log(directory: Path) -> list[dict[str, Any]]:
    """Return the events in a run's starts.jsonl, oldest first. Truncated lines are skipped."""
    path = directory / "starts.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def count_failed_starts(events: list[dict[str, Any]], job: str, restart: int, step: int) -> int:
    """Count the consecutive failed starts of a Slurm job from the same step, before the present start.

    Starts with the same SLURM_RESTART_COUNT count once: they are attempts by hand in an interactive job. An end by a
    signal, or a start from another step or job, resets the count.
    """
    restarts: set[int] = set()
    for event in events:
        if event["event"] == "start" and (event["job"], event["step"]) == (job, step):
            restarts.add(event["restart"])
        elif event["event"] == "start" or (event["event"] == "end" and event["status"] == STOPPED_BY_SIGNAL):
            restarts.clear()
    return len(restarts - {restart})


def count_idle_stops(events: list[dict[str, Any]], job: str, step: int) -> int:
    """Count the last starts of a Slurm job from the same step that a signal stopped at this step."""
    stops, is_same = 0, False
    for event in events:
        if event["event"] == "start":
            is_same = (event["job"], event["step"]) == (job, step)
            stops = stops if is_same else 0
        elif event["event"] == "end":
            stops = stops + 1 if is_same and (event["status"], event["step"]) == (STOPPED_BY_SIGNAL, step) else 0
    return stops

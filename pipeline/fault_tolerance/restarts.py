"""RUN/starts.jsonl: each start and end of a run, written by rank 0; a Slurm job that restarts in vain is stopped."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL

MAX_STARTS_WITHOUT_PROGRESS = 3


class Starts:
    """The record of a run's starts. `began` is when this process did, on its own monotonic clock."""

    def __init__(self, directory: Path, began: float) -> None:
        self.path, self.began = directory / "starts.jsonl", began

    def start(self, step: int, max_steps: int, ranks: int) -> None:
        """Record that this start goes on from `step`.

        Raises:
            UserError: this Slurm job has started from that step three times before and failed each time.
        """
        job = os.environ.get("SLURM_JOB_ID")
        if job and in_vain(read_starts(self.path.parent), job, step) >= MAX_STARTS_WITHOUT_PROGRESS:
            raise UserError(
                f"{self.path.parent}: job {job} failed {MAX_STARTS_WITHOUT_PROGRESS} times without getting past step "
                f"{step}; see its log, and submit it anew once the cause is gone"
            )
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        self._append(event="start", job=job, restart=restart, nodes=nodes, ranks=ranks, step=step, max_steps=max_steps)

    def first_step(self, step: int) -> None:
        """The first step of this start is done."""
        self._append(event="first step", step=step, seconds=round(time.monotonic() - self.began, 2))

    def end(self, step: int, status: int, since_signal: float | None) -> None:
        """This start ends in good order; `since_signal`: seconds since the signal that ended it."""
        self._append(event="end", step=step, status=status, seconds_since_signal=since_signal)

    def _append(self, **facts: Any) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """All events so far; a line that was cut short is left out."""
    path = directory / "starts.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def in_vain(events: list[dict[str, Any]], job: str, step: int) -> int:
    """How often a job started from `step` of late without saving anything; a stop by signal is no failure."""
    number = 0
    for event in events:
        if event["event"] == "start":
            number = number + 1 if (event["job"], event["step"]) == (job, step) else 0
        elif event["event"] == "end" and event["status"] == STOPPED_BY_SIGNAL:
            number = 0
    return number

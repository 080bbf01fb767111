"""Show the status of a run, read from its files, on any host: `python -m pipeline.status RUN [--follow]`."""

import argparse
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.checkpoint.layout import COMPLETE_MARKER, list_checkpoints, step_of
from pipeline.common.atomic_io import read_json_or_none
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.fault_tolerance.lock import LOCK, content_changes
from pipeline.fault_tolerance.restarts import read_restart_log
from pipeline.fault_tolerance.watchdog import HEARTBEAT_SECONDS, heartbeat_path
from pipeline.training.metrics_reader import read_metrics, read_validations

RATE_STEPS = 50  # number of steps over which the rate and the remaining time are computed
FOLLOW_SECONDS = 10.0


def status(run: Path) -> list[str]:
    """Return the status lines of a run.

    Raises:
        UserError: No run has started in the directory.
    """
    events = read_restart_log(run)
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        raise UserError(f"{run}: no run has started in this directory (no starts.jsonl); give a run's output_dir")
    metrics = read_metrics(run)
    failure = read_json_or_none(run / "ranks" / "failed.json")
    lines = [_state(run, events, starts, failed=failure is not None)]
    if metrics:
        lines += _progress(metrics, starts[-1]["max_steps"])
    if validations := read_validations(run):
        lines.append(_validation(validations[-1]))
    lines += [_slowest_rank(run, starts[-1]["ranks"]), _checkpoints(run)]
    if failure:
        lines.append(f"failure      {failure['message'].removeprefix('error: ')}")
    return lines


def _state(run: Path, events: list[dict[str, Any]], starts: list[dict[str, Any]], failed: bool) -> str:
    last = starts[-1]
    if failed:
        # A start that fails before training is not recorded: a last event "end" is of the start before it.
        finished = events[-1]["event"] == "end" and events[-1]["status"] == 0
        state = f"{_end(events[-1])}; then a start failed" if finished else "failed"
    elif (run / LOCK).exists() and content_changes(heartbeat_path(run, 0), 2 * HEARTBEAT_SECONDS):
        state = "running"  # also before this start is recorded, while the shards and a checkpoint are verified
    elif events[-1]["event"] == "end":
        state = _end(events[-1])
    else:
        state = "gone: rank 0 sends no heartbeat; restart to resume"
    job = f"job {last['job']} on {last['nodes']}, " if last["job"] else ""
    return f"state        {state} ({job}{last['ranks']} ranks, started {len(starts)} times)"


def _end(event: dict[str, Any]) -> str:
    """Describe the orderly end of a start."""
    if event.get("stopped_early"):
        return "done, stopped early"
    return "done" if event["status"] == 0 else "stopped by a signal after saving; restart to resume"


def _progress(metrics: list[dict[str, Any]], max_steps: int) -> list[str]:
    last, recent = metrics[-1], metrics[-RATE_STEPS:]
    seconds, rate = (median(record[key] for record in recent) for key in ("step_seconds", "tokens_per_second"))
    left = timedelta(seconds=round((max_steps - last["step"]) * seconds))
    values = [f"{key} {last[key]:.4g}" for key in ("ce_loss", "align_cos", "grad_norm") if last[key] is not None]
    return [
        f"step         {last['step']} of {max_steps}, {seconds:.3g} s each, {rate:.0f} tokens/s, {left} left",
        f"last         {', '.join(values)}; {last['num_tokens']:,} tokens in total",
    ]


def _validation(last: dict[str, Any]) -> str:
    """Describe the last validation and the best one."""
    keys = ("eval_loss", "eval_ce", "eval_alignment")
    values = ", ".join(f"{key} {last[key]:.4g}" for key in keys if last[key] is not None)
    best = f"; best {last['best_metric']:.4g} at step {last['best_step']}" if last.get("best_step") else ""
    return f"validation   step {last['step']}: {values}{best}"


def _slowest_rank(run: Path, ranks: int) -> str:
    """Describe the slowest rank: the one that waited least for the others before the last step."""
    heartbeats = {rank: read_json_or_none(heartbeat_path(run, rank)) or {} for rank in range(ranks)}
    waits = {rank: heartbeat["waited"] for rank, heartbeat in heartbeats.items() if "waited" in heartbeat}
    if len(waits) < 2:
        return "slowest      unknown"
    slowest = min(waits, key=lambda rank: waits[rank])
    lost = max(waits.values()) - waits[slowest]
    host = heartbeats[slowest]["host"]
    return f"slowest      rank {slowest} on {host}: others waited up to {lost:.3f} s for it before a step"


def _checkpoints(run: Path) -> str:
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return "checkpoints  none"
    age = time.time() - (checkpoints[-1] / COMPLETE_MARKER).stat().st_mtime
    ago = f"newest {timedelta(seconds=round(age))} ago" if age >= 0 else "this host's clock is behind"
    return f"checkpoints  {', '.join(str(step_of(path)) for path in checkpoints)} ({ago})"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("--follow", action="store_true", help=f"repeat every {FOLLOW_SECONDS:.0f} s until Ctrl-C")
    args = parser.parse_args()
    print("\n".join(status(args.run)), flush=True)
    while args.follow:
        time.sleep(FOLLOW_SECONDS)
        print("\n" + datetime.now(UTC).astimezone().strftime("%H:%M:%S"))
        print("\n".join(status(args.run)), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)

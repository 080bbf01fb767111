"""How a run is doing, in a few lines: `python -m pipeline.status RUN [--follow]`. Reads its files, on any host."""

import argparse
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.common.errors import UserError, exit_cleanly
from pipeline.fault_tolerance.lock import LOCK, changes
from pipeline.fault_tolerance.restarts import read_starts
from pipeline.fault_tolerance.watchdog import BEAT_SECONDS, rank_file
from pipeline.training.metrics_reader import read_metrics

RECENT = 50  # steps that the rate and the remaining time are taken from
FOLLOW_SECONDS = 10.0
COMPLETE_MARKER = "COMPLETE"


def status(run: Path) -> list[str]:
    """The lines shown for a run.

    Raises:
        UserError: no run there.
    """
    events = read_starts(run)
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        raise UserError(f"{run}: no run has started there (no starts.jsonl); give a run's output_dir")
    metrics = read_metrics(run)
    failed = _json(run / "ranks" / "failed.json")
    lines = [_state(run, events, starts, failed)]
    if metrics:
        lines += _progress(metrics, starts[-1]["max_steps"])
    lines += [_slowest(run, starts[-1]["ranks"]), _checkpoints(run)]
    if failed:
        lines.append(f"failure      {failed['message'].removeprefix('error: ')}")
    return lines


def _state(run: Path, events: list[dict[str, Any]], starts: list[dict[str, Any]], failed: dict[str, Any]) -> str:
    last = starts[-1]
    if events[-1]["event"] == "end":
        state = "done" if events[-1]["status"] == 0 else "stopped by a signal after saving; start again to go on"
    elif failed:
        state = "failed"
    elif (run / LOCK).exists() and changes(rank_file(run, 0), 2 * BEAT_SECONDS):
        state = "running"
    else:
        state = "gone: rank 0 gives no sign of life; start again to go on"
    job = f"job {last['job']} on {last['nodes']}, " if last["job"] else ""
    return f"state        {state} ({job}{last['ranks']} ranks, started {len(starts)} times)"


def _progress(metrics: list[dict[str, Any]], max_steps: int) -> list[str]:
    last, recent = metrics[-1], metrics[-RECENT:]
    seconds, rate = (median(record[key] for record in recent) for key in ("step_seconds", "tokens_per_second"))
    left = timedelta(seconds=round((max_steps - last["step"]) * seconds))
    figures = [f"{key} {last[key]:.4g}" for key in ("ce_loss", "align_cos", "grad_norm") if last[key] is not None]
    return [
        f"step         {last['step']} of {max_steps}, {seconds:.3g} s each, {rate:.0f} tokens/s, {left} left",
        f"last         {', '.join(figures)}; {last['num_tokens']:,} tokens in all",
    ]


def _slowest(run: Path, ranks: int) -> str:
    """The rank that waited least for the others is the one they waited for."""
    found = {rank: _json(rank_file(run, rank)) for rank in range(ranks)}
    waits = {rank: content["waited"] for rank, content in found.items() if "waited" in content}
    if len(waits) < 2:
        return "slowest      unknown"
    slow = min(waits, key=lambda rank: waits[rank])
    lost = max(waits.values()) - waits[slow]
    return f"slowest      rank {slow} on {found[slow]['host']}: others waited up to {lost:.3f} s for it before a step"


def _checkpoints(run: Path) -> str:
    markers = {int(path.parent.name[11:]): path for path in run.glob(f"checkpoint-[0-9]*/{COMPLETE_MARKER}")}
    if not markers:
        return "checkpoints  none"
    age = time.time() - markers[max(markers)].stat().st_mtime
    ago = f"the newest {timedelta(seconds=round(age))} ago" if age >= 0 else "this host's clock is behind"
    return f"checkpoints  {', '.join(map(str, sorted(markers)))} ({ago})"


def _json(path: Path) -> dict[str, Any]:
    """Empty where it is missing or being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("--follow", action="store_true", help=f"again every {FOLLOW_SECONDS:.0f} s, until Ctrl-C")
    args = parser.parse_args()
    print("\n".join(status(args.run)), flush=True)
    while args.follow:
        time.sleep(FOLLOW_SECONDS)
        print("\n" + datetime.now(UTC).astimezone().strftime("%H:%M:%S"))
        print("\n".join(status(args.run)), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)

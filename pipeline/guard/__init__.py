"""What keeps a run safe: one run per directory, signals, hung and lost ranks, restarts that get nowhere."""

from pipeline.guard.guard import Guard
from pipeline.guard.stop import StopSignal

__all__ = ["Guard", "StopSignal"]

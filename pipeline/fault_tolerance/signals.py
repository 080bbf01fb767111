"""USR1 and TERM: remembered when they come, obeyed at the next step boundary. Starts first, so imports little."""

import signal
import time
from types import FrameType


class StopSignal:
    """Catches USR1 (Slurm's --signal) and TERM (preemption, scancel, torchrun) from here on.

    Attributes:
        name: of the first one that came, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._came = 0.0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._came = signal.Signals(number).name, time.monotonic()

    @property
    def received(self) -> bool:
        return self.name is not None

    def seconds_ago(self) -> float | None:
        """Since the first signal came."""
        return round(time.monotonic() - self._came, 2) if self.received else None

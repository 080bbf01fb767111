"""Record USR1 and TERM until the next step boundary. This module is imported first, so it has no slow imports."""

import signal
import time
from types import FrameType


class StopSignal:
    """Handler that records USR1 (Slurm's --signal) and TERM (preemption, scancel, torchrun) from its construction on.

    Attributes:
        name: Name of the first signal received, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._received_at = 0.0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._receive)
        # A process inherits the signals that its parent has blocked, and would never see them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGTERM))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._received_at = signal.Signals(number).name, time.monotonic()

    @property
    def received(self) -> bool:
        """Whether a signal has been received."""
        return self.name is not None

    def seconds_since(self) -> float | None:
        """Return the seconds since the first signal, or None if there was none."""
        return round(time.monotonic() - self._received_at, 2) if self.received else None

"""Signals that end a run at the next step."""

import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline.fault_tolerance.signals import StopSignal

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@pytest.fixture
def blocked_signals() -> Iterator[None]:
    """Block the signals as a parent process may have done, and restore masks and handlers afterwards."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    yield
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # drops a pending one
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stop_signal_is_received_although_it_was_blocked(blocked_signals: None) -> None:
    stop = StopSignal()
    assert not stop.received and stop.seconds_since() is None
    for number in SIGNALS:
        signal.pthread_kill(threading.get_ident(), number)
    assert stop.name == "SIGUSR1" and stop.seconds_since() is not None

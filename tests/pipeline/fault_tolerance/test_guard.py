"""What a rank reports about the error that ends it, without other ranks."""

import json
import signal
from pathlib import Path
from typing import NoReturn

import pytest
from torch.distributed import DistBackendError

from pipeline.common.exit_codes import RANK_FAILURE
from pipeline.fault_tolerance import guard, watchdog
from pipeline.fault_tolerance.guard import Guard
from pipeline.fault_tolerance.signals import StopSignal

NCCL = "NCCL error in: NCCLUtils.cpp:94, NCCL version 2.27.5\nncclError: Call failed.\nLast error:\n"
MEMORY = "Failed to CUDA calloc async 608 bytes: out of memory"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DistBackendError(NCCL + "peer closed\n"), RANK_FAILURE, ": lost contact (peer closed); all ranks are alive"),
        (RuntimeError("[gloo/pair.cc:534] timed out"), RANK_FAILURE, ": lost contact ([gloo/pair.cc:534] timed out); "),
        (DistBackendError(NCCL + MEMORY), 1, f": DistBackendError: {NCCL + MEMORY}\n"),
    ],
    ids=["NCCL", "gloo", "memory"],
)
def test_failed_collective_is_reported_with_its_reason(
    error: Exception,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def exit_test(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(guard, "exit_now", exit_test)
    monkeypatch.setattr(guard, "GRACE_SECONDS", 0)
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    entered = Guard(tmp_path, StopSignal(), timeout=60, started_at=0)
    with pytest.raises(SystemExit) as caught, entered:
        raise error
    entered._watchdog.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    errors = capsys.readouterr().err
    assert caught.value.code == status and message in errors
    assert ("Traceback" in errors) == (status == 1)
    assert json.loads((tmp_path / "ranks" / "failed.json").read_text())["status"] == status

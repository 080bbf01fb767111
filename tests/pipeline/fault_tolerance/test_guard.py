"""What a rank reports about the error that ends it, without other ranks."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from torch.distributed import DistBackendError

from pipeline.common.exit_codes import RANK_FAILURE, USER_ERROR
from pipeline.fault_tolerance import guard, watchdog
from pipeline.fault_tolerance.guard import Guard
from pipeline.fault_tolerance.signals import StopSignal
from tests.runs import ENVIRONMENT, ROOT

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


FAILING_RANK = """
import sys, time
from pathlib import Path
from pipeline.common.errors import UserError
from pipeline.fault_tolerance import guard, watchdog
from pipeline.fault_tolerance.signals import StopSignal

watchdog.HEARTBEAT_SECONDS = 0.05
with guard.Guard(Path(sys.argv[1]), StopSignal(), timeout=1, started_at=0):
    print("step 1")
    if sys.argv[2] == "hangs":
        time.sleep(60)
    raise UserError("a mistake")
"""


@pytest.mark.parametrize(("case", "status"), [("fails", USER_ERROR), ("hangs", RANK_FAILURE)])
def test_rank_ends_with_its_status_although_its_log_is_on_a_full_disk(tmp_path: Path, case: str, status: int) -> None:
    command = [sys.executable, "-c", FAILING_RANK, str(tmp_path), case]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=full, cwd=ROOT, env=ENVIRONMENT, timeout=90)
    assert process.returncode == status


@pytest.mark.parametrize(("case", "is_user_error"), [("fails", True), ("hangs", False)])
def test_job_script_is_told_of_a_user_error_of_one_rank(tmp_path: Path, case: str, is_user_error: bool) -> None:
    """The others may end with the status of a signal, which is greater, so it would be that of the job step."""
    file = tmp_path / "user_error"
    command = [sys.executable, "-c", FAILING_RANK, str(tmp_path), case]
    environment = ENVIRONMENT | {"USER_ERROR_FILE": str(file)}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=90)
    assert file.exists() == is_user_error

"""A real two-node Slurm cluster for the tests of this folder, and checkouts to submit from."""

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Prepared
from tests.runs import ENVIRONMENT, ROOT, losses

SCRIPT = Path(__file__).with_name("cluster.sh")
LAB = "/tmp/solar-train-cluster"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Cluster:
    """Slurm's commands, and what its jobs look like. Jobs get the interpreter of the tests and no DS_ACCELERATOR."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), ENVIRONMENT["PATH"], "/usr/sbin", "/sbin"])
        self.environment = {**ENVIRONMENT, "PATH": path, "SLURM_CONF": f"{LAB}/etc/slurm.conf", "CLUSTER": LAB}
        del self.environment["DS_ACCELERATOR"]  # the job scripts set it

    def script(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SCRIPT, *words], env=self.environment, capture_output=True, text=True, timeout=300)

    def run(self, *words: object, cwd: Path = ROOT, **variables: object) -> str:
        """A command in `cwd` with more environment variables; returns its output."""
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        command = list(map(str, words))
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def sbatch(self, *words: object, cwd: Path, **variables: object) -> str:
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def end(self, job: str, timeout: float = 480) -> dict[str, str]:
        """The job's fields, once it has ended for good."""
        until(lambda: self.state(job) in FINAL, timeout, lambda: f"job {job} is {self.job(job)}")
        return self.job(job)

    def requeued(self, job: str, restarts: int) -> None:
        """Wait until the job is queued again, and spare it the two minutes that Slurm lets a requeued job wait."""

        def queued() -> bool:
            fields = self.job(job)
            return (fields["JobState"], fields["Restarts"]) == ("PENDING", str(restarts))

        def released() -> bool:
            # Again and again, for Slurm may set the time anew when the last process of the earlier start is gone.
            fields = self.job(job)
            state, reason, number = fields["JobState"], fields["Reason"], fields["Restarts"]
            if state != "PENDING" or reason not in ("None", "BeginTime") or number != str(restarts):
                return True
            time.sleep(2)  # a start within the second of the end before is refused: its credential counts as revoked
            command = ["scontrol", "update", f"jobid={job}", "StartTime=now"]
            subprocess.run(command, env=self.environment, capture_output=True)
            return False

        until(queued, 180, lambda: f"job {job} is {self.job(job)}")
        until(released, 180, lambda: f"job {job} is {self.job(job)}")


def until(met: Callable[[], bool], timeout: float, describe: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + timeout
    while not met():
        assert time.monotonic() < deadline, f"waited {timeout} s: {describe()}"
        time.sleep(0.1)


def wait_for_steps(run: Path, steps: int) -> None:
    until(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= steps, 300, lambda: log_of(run.parent))


def log_of(checkout: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(checkout.glob("slurm-*.log")))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Up for all tests of this folder; one run of the tests at a time on a machine."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("a Slurm cluster in namespaces needs Linux and root")
    with open(f"{LAB}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        slurm = Cluster()
        result = slurm.script("up")
        if result.returncode == 3:
            pytest.skip(result.stderr.strip().splitlines()[-1])
        assert result.returncode == 0, result.stderr
        yield slurm
        slurm.script("down")


@pytest.fixture(scope="session")
def checkout(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a user has it, with records and a tokenizer."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("pipeline", "data_prep", "ds_configs", "slurm"):
        (root / name).symlink_to(ROOT / name)
    for name, target in {"train.jsonl": prepared.data, "test.jsonl": prepared.test}.items():
        (root / name).symlink_to(target)
    (root / "tokenizer").symlink_to(prepared.tokenizer)
    return root

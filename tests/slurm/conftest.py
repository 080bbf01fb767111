"""Fixtures: a real two-node Slurm cluster, and a checkout to submit jobs from."""

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
    """Slurm commands on the test cluster. Jobs use the interpreter of the tests, and no DS_ACCELERATOR is set."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(sys.prefix) / "bin"), ENVIRONMENT["PATH"], "/usr/sbin", "/sbin"])
        self.environment = {**ENVIRONMENT, "PATH": path, "SLURM_CONF": f"{LAB}/etc/slurm.conf", "CLUSTER": LAB}
        del self.environment["DS_ACCELERATOR"]  # the job scripts set it

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run cluster.sh."""
        return subprocess.run([SCRIPT, *arguments], env=self.environment, capture_output=True, text=True, timeout=300)

    def run(self, *command: object, cwd: Path = ROOT, **variables: object) -> str:
        """Run a command in `cwd` with additional environment variables; return its output."""
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        arguments = list(map(str, command))
        result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def sbatch(self, *arguments: object, cwd: Path, **variables: object) -> str:
        """Submit a job and return its id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job)))

    def state(self, job: str) -> str:
        """Return a job's state."""
        return self.job(job)["JobState"]

    def end(self, job: str, timeout: float = 480) -> dict[str, str]:
        """Wait until a job has ended for good; return its fields."""
        until(lambda: self.state(job) in FINAL, timeout, lambda: f"job {job} is {self.job(job)}")
        return self.job(job)

    def requeued(self, job: str, restarts: int) -> None:
        """Wait until a job is requeued, and skip the two minutes that Slurm holds a requeued job back."""

        def queued() -> bool:
            fields = self.job(job)
            return (fields["JobState"], fields["Restarts"]) == ("PENDING", str(restarts))

        def released() -> bool:
            # Repeatedly, as Slurm may reset the start time when the last process of the previous start has ended.
            fields = self.job(job)
            state, reason, count = fields["JobState"], fields["Reason"], fields["Restarts"]
            if state != "PENDING" or reason not in ("None", "BeginTime") or count != str(restarts):
                return True
            time.sleep(2)  # a start in the same second as the previous end is refused as a revoked credential
            command = ["scontrol", "update", f"jobid={job}", "StartTime=now"]
            subprocess.run(command, env=self.environment, capture_output=True)
            return False

        until(queued, 180, lambda: f"job {job} is {self.job(job)}")
        until(released, 180, lambda: f"job {job} is {self.job(job)}")


def until(condition: Callable[[], bool], timeout: float, describe: Callable[[], str] = str) -> None:
    """Wait until a condition holds; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s: {describe()}"
        time.sleep(0.1)


def wait_for_steps(run: Path, steps: int) -> None:
    """Wait until a run has done some optimizer steps."""
    until(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= steps, 300, lambda: log_of(run.parent))


def log_of(checkout: Path) -> str:
    """Return the ends of all job logs, for messages."""
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(checkout.glob("slurm-*.log")))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, up for all tests of this directory. A file lock admits one test run at a time on a machine."""
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
    """A repository checkout with records and a tokenizer."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("pipeline", "data_prep", "ds_configs", "slurm"):
        (root / name).symlink_to(ROOT / name)
    for name, target in {"train.jsonl": prepared.data, "test.jsonl": prepared.test}.items():
        (root / name).symlink_to(target)
    (root / "tokenizer").symlink_to(prepared.tokenizer)
    return root

"""Available memory and out-of-memory kills, from cgroup files and from a process that the kernel kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.common.memory import available_host_memory, count_oom_kills

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_memory_of_job_in_cgroup_v2(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/slurm/job_7"
    root = write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {4096 * 1024} kB",
            "proc/vmstat": "oom_kill 9",
            "proc/self/cgroup": "0::/slurm/job_7/step_0",
            f"{job}/memory.max": 1000 * MIB,
            f"{job}/memory.current": 800 * MIB,
            f"{job}/memory.stat": f"anon 5\ninactive_file {100 * MIB}\nactive_file {50 * MIB}",
            f"{job}/memory.events": "low 0\noom 2\noom_kill 2",
            f"{job}/step_0/memory.max": "max",
            f"{job}/step_0/memory.current": 800 * MIB,
            f"{job}/step_0/memory.events": "oom_kill 1",
        },
    )
    assert available_host_memory(root) == 350 * MIB
    assert count_oom_kills(root) == 3


def test_memory_of_host_without_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 2048 kB",
            "proc/vmstat": "nr_free_pages 1\noom_kill 4",
            "proc/self/cgroup": "4:memory:/a\n0::/",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 5,
        },
    )
    assert available_host_memory(root) == 2 * MIB
    assert count_oom_kills(root) == 4


ALLOCATE = """
import os, subprocess, sys
from pipeline.common.memory import available_host_memory, count_oom_kills
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
before, available = count_oom_kills(), available_host_memory()
child = subprocess.run([sys.executable, "-c", "x = b'x' * (200 * 2**20)"])
print(child.returncode, count_oom_kills() - before, available < 101 * 2**20)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="creating a cgroup needs root")
def test_count_oom_kills_of_killed_process() -> None:
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (v1 if v1.is_dir() else v2) / f"solar-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(100 * MIB))
    except OSError:
        pytest.skip("cgroups are read-only here")
    try:
        python = Path(sys.prefix) / "bin" / "python"  # a process of its own, not a fork outside the cgroup
        result = subprocess.run([python, "-c", ALLOCATE, str(group)], capture_output=True, text=True)
        assert result.stdout.split() == ["-9", "1", "True"], result.stderr
    finally:
        group.rmdir()

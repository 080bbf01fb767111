"""Host memory available to this process, and kills by the kernel's out-of-memory killer, from /proc and cgroups."""

import re
from collections.abc import Iterator
from pathlib import Path


def available_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that this process and its siblings can still allocate.

    It is the least of MemAvailable and what the memory limit of each cgroup leaves, for example that of a Slurm job.
    Page cache counts as available.

    Args:
        root: Root of the file system.
    """
    available = 1024 * _number(root / "proc/meminfo", "MemAvailable:")
    for group in _memory_cgroups(root):
        unified = (group / "memory.current").exists()
        limit = _read(group / ("memory.max" if unified else "memory.limit_in_bytes"))
        used = _read(group / ("memory.current" if unified else "memory.usage_in_bytes"))
        if limit.isdigit() and used.isdigit():  # no limit is "max", or in version 1 a number close to 2^63
            names = ("inactive_file", "active_file") if unified else ("total_inactive_file", "total_active_file")
            cache = sum(_number(group / "memory.stat", name) for name in names)
            available = min(available, int(limit) - int(used) + cache)
    return max(available, 0)


def count_oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed for lack of memory.

    The processes are those of this process's cgroups, or of the whole host if no cgroup counts them.

    Args:
        root: Root of the file system.
    """
    files = [
        file
        for group in _memory_cgroups(root)
        for file in (group / "memory.events", group / "memory.oom_control")
        if re.search(r"^oom_kill ", _read(file), re.MULTILINE)
    ]
    return sum(_number(file, "oom_kill") for file in files or [root / "proc/vmstat"])


def _memory_cgroups(root: Path) -> Iterator[Path]:
    """Yield the directories of this process's memory cgroup and its ancestors, of version 2 and version 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        group = mount / name.strip("/")
        # In a container, the path may be that on the host, and the container's own cgroup is mounted.
        yield from [each for each in (group, *group.parents) if each.is_relative_to(mount) and each.is_dir()]


def _number(file: Path, key: str) -> int:
    """Return the number after `key` at the start of a line, or 0 if there is none."""
    match = re.search(rf"^{re.escape(key)}\s+(\d+)", _read(file), re.MULTILINE)
    return int(match[1]) if match else 0


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

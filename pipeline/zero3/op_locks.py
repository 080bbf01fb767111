"""Find locks that an interrupted build of a DeepSpeed op has left behind.

torch.utils.cpp_extension locks the build directory of an op by creating a file `lock` in it, which the building process
keeps open (`torch.utils.file_baton`). All other processes wait until it is deleted, without a message or a timeout. A
process that is killed while it compiles does not delete it.
"""

import os
import sys
import tempfile
from pathlib import Path

STALE_SECONDS = 600.0  # a compiler writes a file more often than that


def handle_stale_locks() -> None:
    """Delete locks that are certainly stale, and print a line for every other lock that nothing on this host holds.

    A lock is stale if no process on this host has it open and no file beside it has changed for ten minutes. The age
    matters because another host may be building in a shared home directory, whose clock may differ from this host's.
    Call it on one rank per node.
    """
    for lock in _locks():
        try:
            if _is_open(lock):
                continue
            age = _time_of_file_system(lock) - max(path.stat().st_mtime for path in lock.parent.iterdir())
            if age > STALE_SECONDS:
                lock.unlink()
                print(f"note: deleted {lock}, left by an interrupted build of {lock.parent.name}", flush=True)
                continue
        except OSError:  # another process has deleted it
            continue
        print(
            f"note: waiting for another build of {lock.parent.name}; if none is running on any host, it was "
            f"interrupted: delete {lock}",
            flush=True,
        )


def _locks() -> list[Path]:
    """Return the existing lock files of this Python version's ops."""
    if directory := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return list(Path(directory).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return list(Path(get_default_build_root()).glob(f"{python}*/*/lock"))


def _time_of_file_system(lock: Path) -> float:
    """Return the present time by the clock that a lock's file system dates new files with."""
    # Not beside the lock, where another node would take it for the output of a build.
    with tempfile.TemporaryFile(dir=lock.parent.parent) as file:
        return os.fstat(file.fileno()).st_mtime


def _is_open(file: Path) -> bool:
    """Return whether a process on this host has a file open. Processes of other users are not visible."""
    status = file.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            other = descriptor.stat()
        except OSError:
            continue
        if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
            return True
    return False

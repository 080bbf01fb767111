"""Write checkpoint files durably and hash them, and copy state to host memory before a background write."""

import copy
import hashlib
import json
import mmap
import os
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch import Tensor

from pipeline.checkpoint import layout
from pipeline.common.errors import UserError, write_error

VISIBLE_SECONDS = 60.0  # maximum delay until files of one node appear on another (shared file system)
LARGE_BYTES = 1 << 26  # size from which a tensor gets pages of its own
HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all GPUs


class HostCopies:
    """Reusable copies of a state's tensors in host memory, pinned for tensors from a GPU.

    The buffers stay allocated from the first save until the end of the run. They hold one copy of this rank's part of
    a checkpoint (fp32 weights and two Adam moments), which takes 12 bytes x parameters / ranks.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def copy_to_host(self, state: Any) -> Any:
        """Copy a nested structure of dicts, lists and values. Returns after the copies are complete.

        The tensors of the result are overwritten by the next call.
        """
        self._used = 0
        copied = self._copy(state)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps the order and the class
            copied.update({key: self._copy(item) for key, item in value.items()})
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return copy.deepcopy(value)

    def _buffer(self, like: Tensor) -> Tensor:
        """Return the next buffer, reallocated if its shape or dtype differs from those of `like`."""
        index, self._used = self._used, self._used + 1
        old = self._buffers[index] if index < len(self._buffers) else None
        if old is not None and (old.shape, old.dtype) == (like.shape, like.dtype):
            return old
        new = _pinned_like(like) if like.is_cuda else torch.empty(like.shape, dtype=like.dtype)
        self._buffers[index : index + 1] = [new]  # replaces the old buffer or, at the end, appends
        return new


def _pinned_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized tensor in pinned host memory.

    torch rounds the size of a pinned tensor up to a power of two. A large one is therefore pinned here, if the driver
    allows it.
    """
    size = tensor.numel() * tensor.element_size()
    if size >= LARGE_BYTES:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pinned = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        runtime, address = torch.cuda.cudart(), pinned.data_ptr()
        if int(runtime.cudaHostRegister(address, size, HOST_REGISTER_PORTABLE)) == 0:
            # At the end of the process there is nothing to unregister, and the driver may be gone.
            weakref.finalize(pinned, runtime.cudaHostUnregister, address).atexit = False
            return pinned
        _forget_cuda_error(tensor.device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _forget_cuda_error(device: torch.device) -> None:
    """Remove the error of a failed call from CUDA, which torch would report after its next kernel instead.

    torch does not expose `cudaGetLastError`, but calls it after this kernel.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


class HashingWriter:
    """Binary file for writing that computes the SHA-256 of its content. A thread hashes each block while it is written.

    Args:
        file: Open file to write to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksum")

    def write(self, block: bytes) -> int:
        """Write a block. Its memory is not used after the call."""
        hashed = self._thread.submit(self._hash.update, block)
        try:
            return self._file.write(block)
        finally:
            hashed.result()

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Return the hex SHA-256 of everything written so far."""
        return self._hash.hexdigest()

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()


def write_file(path: Path, content: Any) -> tuple[int, str]:
    """Write a file and flush it to disk.

    Args:
        path: File to write. Missing parent directories are created.
        content: Bytes, which are written unchanged, or any other object, which is written with `torch.save`.

    Returns:
        Size of the file in bytes, and its hex SHA-256.

    Raises:
        UserError: The write failed; the message names the file and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file, HashingWriter(file) as writer:
            if isinstance(content, bytes):
                writer.write(content)
            else:
                torch.save(content, cast(IO[bytes], writer))  # calls `write` only
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size, writer.hexdigest()
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError, with the OSError as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise write_error(path, cause) from error


def write_rank_files(partial: Path, rank: int, files: dict[str, Any]) -> None:
    """Write the files of a rank, then the list of their sizes and checksums, for `merge_records`.

    Raises:
        UserError: A file cannot be written.
    """
    records = {name: write_file(partial / name, content) for name, content in files.items()}
    write_file(_records_path(partial, rank), json.dumps(records).encode())


def _records_path(partial: Path, rank: int) -> Path:
    """Return the path of the file that lists the files of a rank with their sizes and checksums."""
    return partial / f"files-{rank}.json"


def merge_records(partial: Path, ranks: int) -> dict[str, tuple[int, str]]:
    """Merge the file lists of all ranks, then delete them.

    Raises:
        UserError: The list of a rank does not appear on this host.
    """
    records: dict[str, tuple[int, str]] = {}
    deadline = time.monotonic() + VISIBLE_SECONDS
    for rank in range(ranks):
        path = _records_path(partial, rank)
        while not path.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{partial}: the files of rank {rank} are not visible on this host; "
                    "output_dir must be on a file system that all nodes share"
                )
            time.sleep(0.5)
        records |= json.loads(path.read_text())
        path.unlink()
    return records


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk.

    Raises:
        OSError: The path cannot be opened or flushed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name. Never replaces an intact checkpoint.

    Raises:
        StorageError: An existing checkpoint of this step cannot be read.
        OSError: The rename, a deletion or a flush fails.
    """
    flush_to_disk(partial)
    if final.exists():
        if layout.find_damage(final) is None:
            shutil.rmtree(partial)
            return
        layout.remove_checkpoint(final)
    os.replace(partial, final)
    flush_to_disk(final.parent)

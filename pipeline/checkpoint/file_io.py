"""Files of a checkpoint on their way to disk: copies in host memory, and writes that say what went wrong."""

import copy
import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.common.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HostCopies:
    """Copies of a state's tensors in host memory, pinned where they come from a GPU; the next state reuses them.

    One copy of this rank's checkpoint stays allocated from the first save on: fp32 weights and two Adam moments,
    12 bytes x parameters / ranks.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def take(self, state: Any) -> Any:
        """The same tree of dicts, lists and values with every tensor copied; complete on return."""
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
        index, self._used = self._used, self._used + 1
        old = self._buffers[index] if index < len(self._buffers) else None
        if old is not None and (old.shape, old.dtype) == (like.shape, like.dtype):
            return old
        new = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self._buffers[index : index + 1] = [new]
        return new


def write(path: Path, content: Any) -> int:
    """Write bytes, or any other object as torch.save does, and flush them to disk. Returns the file's size in bytes.

    Raises:
        UserError: the system refuses; names the file and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
    except (OSError, RuntimeError) as error:
        # torch.save reports a write that failed as a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise refused(path, cause) from error


def refused(path: Path, error: OSError) -> UserError:
    remedy = "free space" if error.errno in NO_ROOM else "mend this"
    return UserError(f"cannot write {path}: {error.strerror or error}; {remedy} and start again")


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

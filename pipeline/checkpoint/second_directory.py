"""Copy finished checkpoints to a second directory in a thread of its own, which neither training nor saves wait for."""

import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.checkpoint import layout
from pipeline.checkpoint.export_record import checkpoint_id, run_id
from pipeline.checkpoint.file_io import flush_to_disk, publish
from pipeline.common.errors import StorageError

COPY_BLOCK_BYTES = 2**24


class CheckpointCopier:
    """Copies checkpoints of one run to `training.copy_checkpoints_to`, one at a time.

    A checkpoint that is finished during a copy is copied next. Of several, only the newest and the best are copied, so
    that a slow directory still gets whole checkpoints.

    Args:
        directory: The second directory.
        limit: Number of checkpoints to keep there.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self._limit = directory, limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._job: Future[None] | None = None
        self._lock = threading.Lock()
        self._waiting: list[Path] = []
        self._current: Path | None = None
        self._newest: Path | None = None
        self._best_step: int | None = None
        self._stopped = False

    def start(self, path: Path, best_step: int | None) -> Path | None:
        """Copy a checkpoint, and the best one, after the copy in progress. Do nothing for those that are there already.

        Args:
            path: The newest checkpoint.
            best_step: Step of the best checkpoint, which rotation keeps, or None.

        Returns:
            The checkpoint whose copy is in progress, or None. Do not delete it.
        """
        best = path.with_name(f"checkpoint-{best_step}")
        with self._lock:
            self._waiting = [path, best] if best != path and (best / layout.COMPLETE_MARKER).is_file() else [path]
            self._newest, self._best_step, current = path, best_step, self._current
        self._job = self._thread.submit(self._copy_waiting)
        return current

    def wait(self) -> None:
        """Wait until nothing is left to copy."""
        if self._job is not None:
            self._job.result()

    def stop(self) -> bool:
        """Break off the copy in progress and make later ones fail. Return whether there was one."""
        self._stopped = True
        return self._job is not None and not self._job.done()

    def _copy_waiting(self) -> None:
        while True:
            with self._lock:
                self._current = self._waiting.pop(0) if self._waiting else None
            if self._current is None:
                return
            self._copy(self._current)

    def _copy(self, source: Path) -> None:
        """Copy a checkpoint and the validation that was added to it. On failure, print a warning."""
        target = self.directory / source.name
        partial = target.with_name(f".{target.name}.partial")
        try:
            self._check_no_others(source)
            if layout.find_damage(target) is not None:
                shutil.rmtree(partial, ignore_errors=True)
                partial.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, partial, copy_function=self._copy_file)
                for file in partial.rglob("*"):
                    flush_to_disk(file)
                publish(partial, target)
                layout.rotate_checkpoints(self.directory, self._limit, self._best_step)
            validation = layout.read_marker(source).get("validation")
            if validation is not None:
                layout.store_validation(target, validation)
        except (OSError, StorageError, _NotCopiedError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            print(f"warning: {source.name} not copied to {self.directory}: {reason}", flush=True)

    def _check_no_others(self, source: Path) -> None:
        """Check that the directory has no checkpoints that rotation would delete, or keep, in place of this run's.

        Raises:
            _NotCopiedError: It has one of another run, one that is newer than this run, which was then set back to an
                earlier checkpoint, or one of the same step that is not a copy of `source`.
            StorageError: The directory cannot be read.
        """
        run, checkpoint, newest = run_id(source), checkpoint_id(source), layout.step_of(self._newest or source)
        for path in layout.list_checkpoints(self.directory):
            if run and run_id(path) not in ("", run):
                what = "of another run"
            elif layout.step_of(path) > newest:
                what = "newer"
            elif checkpoint and path.name == source.name and checkpoint_id(path) != checkpoint:
                what = "not a copy of it"
            else:
                continue
            if layout.find_damage(path) is None:
                raise _NotCopiedError(f"{path.name} there is {what}; move it away")

    def _copy_file(self, source: str, target: str) -> str:
        try:
            with open(source, "rb") as reader, open(target, "wb") as writer:
                while block := reader.read(COPY_BLOCK_BYTES):
                    if self._stopped:
                        raise _NotCopiedError("the run is stopping; a restart copies the newest checkpoint")
                    writer.write(block)
        except OSError as error:  # which shutil.copytree would collect while it goes on with the other files
            raise _NotCopiedError(error.strerror or str(error)) from error
        return target


class _NotCopiedError(Exception):
    """A copy was broken off, or not begun."""

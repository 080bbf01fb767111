"""Save checkpoints while training continues: a background thread on each rank writes its files.

A save has these steps. A kill between any two of them leaves the older checkpoints intact:

1. All ranks, between two optimizer steps: copy the weights and optimizer state to host memory (`Saver.start`).
2. Thread on each rank: write this rank's files into .checkpoint-N.partial, flush them to disk, then write their sizes
   and checksums.
3. All ranks, in the all-reduce of a later step: check whether all ranks have finished writing or any has failed
   (`Saver.local_status`, `Saver.advance`).
4. Thread on rank 0: write COMPLETE, rename to checkpoint-N, rotate old checkpoints.
5. Another thread on rank 0: copy to the second directory, if there is one.

With `training.save_in_background: false` the steps are the same, but training waits and the state is not copied.
"""

import json
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save

from pipeline.checkpoint import layout
from pipeline.checkpoint.file_io import HostCopies, flush_to_disk, merge_records, publish, write_rank_files
from pipeline.checkpoint.layout import COMPLETE_MARKER, DEEPSPEED_TAG, ModelIdentity
from pipeline.checkpoint.second_directory import CheckpointCopier
from pipeline.common import distributed
from pipeline.common.atomic_io import sha256_file, write_atomically
from pipeline.common.errors import AgreedError, StorageError, UserError, storage_errors, write_error
from pipeline.config.settings import Config
from pipeline.zero3.engine import ZeroEngine


class SupportsSavePretrained(Protocol):
    """A Hugging Face configuration or tokenizer."""

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Write the files that `from_pretrained` reads."""


class Saver:
    """Saves checkpoints of one run, one at a time.

    Args:
        config: Settings of the run.
        model: Model identity, recorded in each checkpoint and compared before a run resumes from it.
        pretrained: Objects to store in each checkpoint for export, by folder name.
        engine: Engine to save.
        saved_state: Trainer state of the checkpoint that the run resumed from, or the initial state of a new run.

    Attributes:
        saved_step: Step of the newest checkpoint, finished or in progress.
    """

    def __init__(
        self,
        config: Config,
        model: ModelIdentity,
        pretrained: Mapping[str, SupportsSavePretrained],
        engine: ZeroEngine,
        saved_state: dict[str, Any],
    ) -> None:
        self.config, self.model, self.pretrained, self.engine = config, model, pretrained, engine
        self.directory = Path(config.output_dir)
        self._copies = HostCopies() if config.training.save_in_background else None
        self.saved_step: int = saved_state["step"]
        self._saved_validation: dict[str, Any] = saved_state["validation"]
        self._best_step: int | None = saved_state["validation"].get("best_step")  # when this save was started
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None
        self._writing = False  # whether the job writes this rank's files; otherwise it is the commit on rank 0
        self._partial: Path | None = None
        self._failure: UserError | None = None
        self._wait_seconds = 0.0
        self._copier: CheckpointCopier | None = None
        if distributed.is_main_process():
            second = config.training.copy_checkpoints_to
            for directory in map(Path, filter(None, (config.output_dir, second))):
                with suppress(OSError):  # the next save or copy reports a directory that cannot be read
                    for unfinished in directory.glob(".checkpoint-*.partial"):
                        shutil.rmtree(unfinished, ignore_errors=True)
            if second is not None:
                self._copier = CheckpointCopier(Path(second), config.training.save_total_limit)
                if self.saved_step:  # its copy may have been broken off, or the setting may be new
                    self._copier.start(self._path_of(self.saved_step), self._best_step)
        distributed.barrier()

    def _path_of(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"

    def start(self, state: dict[str, Any], best_step: int | None = None) -> None:
        """Start saving `state`, the engine and this rank's random generators.

        Collective: all ranks must call it, between two optimizer steps. Waits for the previous save first. If the step
        has already been saved, only adds a validation that has ended since.

        Args:
            state: Trainer state, including `step` and `validation`; must be JSON-serializable.
            best_step: Step of the best checkpoint, which rotation keeps, or None.

        Raises:
            AgreedError: This or the previous checkpoint cannot be written.
        """
        if state["step"] == self.saved_step:
            if state["validation"] != self._saved_validation:
                self._best_step = best_step
                self._store_validation(state)
            return
        started = time.perf_counter()
        self.finish()
        self.saved_step, self._saved_validation, self._best_step = state["step"], state["validation"], best_step
        self._partial = self.directory / f".checkpoint-{state['step']}.partial"
        files = self.engine.checkpoint_files(self._partial, DEEPSPEED_TAG)
        if self._copies:
            files = self._copies.copy_to_host(files)
        files[f"rng-{distributed.rank()}.safetensors"] = save(_rng_state())
        if distributed.is_main_process():
            files |= self._shared_files(state)
        self._job, self._writing = self._thread.submit(write_rank_files, self._partial, distributed.rank(), files), True
        if self._copies is None:
            self.finish()
        self._wait_seconds += time.perf_counter() - started

    def _store_validation(self, state: dict[str, Any]) -> None:
        """Add the validation of a step to its finished checkpoint. On failure, print a warning and continue."""
        self.finish()
        self._saved_validation = state["validation"]
        if not distributed.is_main_process():
            return
        path = self._path_of(state["step"])
        if self._copier and not path.exists():  # the run has resumed from the second directory
            path = self._copier.directory / path.name
        try:
            layout.store_validation(path, state["validation"])
        except (OSError, StorageError) as error:
            print(f"warning: {path}: the validation cannot be stored ({error}); training continues", flush=True)
        if self._copier:
            self._copier.start(self._path_of(state["step"]), self._best_step)

    def pop_wait_seconds(self) -> float:
        """Return the seconds that training has waited for saves since the last call."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def local_status(self) -> list[float]:
        """Return [files written, save failed] for this rank, each 0 or 1. Sum over ranks for `advance`."""
        done = self._job is not None and self._job.done()
        failed = self._failure is not None or self._job_error() is not None
        return [float(done and self._writing), float(failed)]

    def advance(self, written: float, failed: float) -> None:
        """Advance the save in progress. Collective: all ranks must call it with the same arguments.

        Once all ranks have written their files, the thread on rank 0 commits the checkpoint.

        Args:
            written: Number of ranks that have written their files.
            failed: Number of ranks whose save failed.

        Raises:
            AgreedError: On all ranks, if any rank has failed. The unfinished checkpoint is removed.
        """
        if failed:
            self._abort()
        if self._writing and written == distributed.world_size():
            self._job, self._writing = None, False
            if distributed.is_main_process():
                assert self._partial is not None
                self._job = self._thread.submit(self._commit, self._partial)

    def finish(self) -> None:
        """Wait for the save in progress, if any. Collective: all ranks must call it.

        Raises:
            AgreedError: The checkpoint cannot be written.
        """
        # The two jobs of a save: every rank's files, then the commit by rank 0, which `advance` starts.
        for _ in ("files", "commit"):
            if self._job is not None:
                wait([self._job])
            self.advance(*distributed.all_reduce_sum(self.local_status(), self.engine.device))

    def stop_copying(self) -> bool:
        """Break off copies to training.copy_checkpoints_to, which can take longer than a signal allows.

        Returns:
            Whether this rank had one in progress.
        """
        return self._copier is not None and self._copier.stop()

    def finish_copies(self, heartbeat: Callable[[], None], is_stopping: Callable[[], bool]) -> bool:
        """Wait for the copies to training.copy_checkpoints_to after the last save. Collective: all ranks must call it.

        Args:
            heartbeat: Called on all ranks every few seconds.
            is_stopping: Called on all ranks every few seconds. If it returns True on any rank, copies are broken off.

        Returns:
            False if a copy was broken off.
        """
        if self.config.training.copy_checkpoints_to is None:
            return True
        try:
            distributed.run_long_on_rank0(self._wait_for_copies, heartbeat, is_stopping)
        except distributed.WorkStopped:
            return not distributed.broadcast_from_rank0(self.stop_copying)
        return True

    def _wait_for_copies(self) -> None:
        """Wait for the copies, then delete a checkpoint that was kept for them. Runs in a thread on rank 0."""
        assert self._copier is not None
        self._copier.wait()
        with storage_errors(self.directory, write_error):
            self._rotate()

    def _rotate(self, copied: Path | None = None) -> None:
        layout.rotate_checkpoints(self.directory, self.config.training.save_total_limit, self._best_step, copied)

    def record_failure(self, path: Path, error: OSError) -> None:
        """Record a failed write of another file, so that the next `advance` raises on all ranks."""
        self._failure = self._failure or write_error(path, error)

    def _job_error(self) -> BaseException | None:
        return self._job.exception() if self._job is not None and self._job.done() else None

    def _abort(self) -> None:
        """Remove the unfinished checkpoint, and raise the first failure on all ranks."""
        if self._job is not None:
            wait([self._job])
        error = self._failure or self._job_error()
        local = None
        if isinstance(error, UserError):
            local = f"{distributed.rank_label()}: {error}", error.status
        elif error is not None:
            traceback.print_exception(error)  # a bug, of which the other ranks only know the message
            local = f"{distributed.rank_label()}: {type(error).__name__}: {error}", 1
        failures = distributed.all_gather_object(local)
        if distributed.is_main_process() and self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        raise AgreedError(*next(failure for failure in failures if failure is not None)) from error

    def _shared_files(self, state: dict[str, Any]) -> dict[str, bytes]:
        """Return the checkpoint files that are not per rank."""
        engine = self.engine
        trainer_state = state | {
            "ranks": distributed.world_size(),
            **asdict(self.model),
            "vocabulary_parameters": engine.vocabulary_names(),
            "tied": engine.tied,
            "model_signature": layout.model_signature(engine.ds_engine.module),
        }
        files = {
            "trainer_state.json": json.dumps(trainer_state, indent=1).encode(),
            "config.yaml": layout.recipe_yaml(self.config).encode(),
        }
        if engine.running_means is not None:
            files["centres.safetensors"] = save(
                {"means": engine.running_means.means, "seen": engine.running_means.seen}
            )
        return files

    def _commit(self, partial: Path) -> None:
        """Complete and publish a checkpoint that all ranks have written. Runs in the thread on rank 0.

        Raises:
            UserError: A file cannot be written, or the files of a rank do not appear on this host.
        """
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        try:
            files = merge_records(partial, distributed.world_size())
            for name, item in self.pretrained.items():
                item.save_pretrained(partial / name)
                for file in (partial / name).rglob("*"):
                    flush_to_disk(file)
                    if file.is_file():
                        files[str(file.relative_to(partial))] = (file.stat().st_size, sha256_file(file))
            write_atomically(partial / COMPLETE_MARKER, layout.complete_marker(files))
            publish(partial, final)
            self._rotate(self._copier.start(final, self._best_step) if self._copier else None)
        except OSError as error:
            raise write_error(partial, error) from error


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state

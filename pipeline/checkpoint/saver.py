"""Checkpoints written while training goes on, by a thread of each rank; they count when all ranks are done.

One save takes these steps; a kill between any two leaves the older checkpoints as they were:

1. all ranks, between two steps: copy weights and optimizer to host memory (`Saver.begin`)
2. each rank's thread: write its files into .checkpoint-N.partial, flush them to disk, then list their sizes
3. all ranks, at a later step's all-reduce: all are written, or one has failed (`Saver.report`, `Saver.settle`)
4. rank 0's thread: write COMPLETE, rename to checkpoint-N, drop the oldest, copy to the second place

Without `training.save_in_background` the same happens, but training waits and nothing is copied in memory.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save

from pipeline.checkpoint import layout
from pipeline.checkpoint.file_io import HostCopies, refused, sync, write
from pipeline.checkpoint.layout import COMPLETE_MARKER, DEEPSPEED_TAG, ModelIdentity
from pipeline.common import distributed
from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import AgreedError, UserError
from pipeline.config.settings import Config
from pipeline.zero3.engine import ZeroEngine

VISIBLE_SECONDS = 60.0  # how long a shared filesystem may take to show one node's files to another


class SupportsSavePretrained(Protocol):
    """A Hugging Face configuration or tokenizer."""

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Write the files that `from_pretrained` reads."""


class Saver:
    """The saves of one run, never two at a time.

    Attributes:
        seconds: how long training has waited for saves since it was last asked (`take_seconds`).
    """

    def __init__(
        self,
        config: Config,
        model: ModelIdentity,
        pretrained: Mapping[str, SupportsSavePretrained],
        zero: ZeroEngine,
        saved_step: int = 0,
    ) -> None:
        self.config, self.model, self.pretrained, self.zero = config, model, pretrained, zero
        self.directory = Path(config.output_dir)
        self.copies = HostCopies() if config.training.save_in_background else None
        self._saved_step = saved_step  # of the newest checkpoint, finished or on its way
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None
        self._writing = False  # the job writes this rank's files; else it is rank 0's commit
        self._partial: Path | None = None
        self._failure: UserError | None = None
        self.seconds = 0.0
        if distributed.is_main_process():
            for torn in self.directory.glob(".checkpoint-*.partial"):
                shutil.rmtree(torn, ignore_errors=True)
        distributed.barrier()

    def begin(self, state: dict[str, Any]) -> None:
        """Save `state` (with its `step`), the engine and this rank's generators; all ranks call it between steps.

        Raises:
            AgreedError: this or the save before cannot be written.
        """
        if state["step"] == self._saved_step:
            return
        started = time.perf_counter()
        self.finish()
        self._saved_step = state["step"]
        final = self.directory / f"checkpoint-{state['step']}"
        self._partial = self.directory / f".{final.name}.partial"
        files = self.zero.state_files(self._partial, DEEPSPEED_TAG)
        if self.copies:
            files = self.copies.take(files)
        files[f"rng-{distributed.rank()}.safetensors"] = save(_rng_state())
        if distributed.is_main_process():
            files |= self._common_files(state)
        self._job, self._writing = self._thread.submit(self._write, self._partial, files), True
        if self.copies is None:
            self.finish()
        self.seconds += time.perf_counter() - started

    def take_seconds(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def report(self) -> list[float]:
        """[this rank has written its files, something failed here], to be summed over ranks for `settle`."""
        done = self._job is not None and self._job.done()
        return [float(done and self._writing), float(self._failure is not None or (done and self._error() is not None))]

    def settle(self, written: float, failed: float) -> None:
        """Go on with the sums of all ranks' reports: all call it with the same.

        Raises:
            AgreedError: on all ranks, where one has failed; the unfinished checkpoint is removed.
        """
        if failed:
            self._give_up()
        if self._writing and written == distributed.world_size():
            self._job, self._writing = None, False
            if distributed.is_main_process():
                assert self._partial is not None
                self._job = self._thread.submit(self._commit, self._partial)

    def finish(self) -> None:
        """Wait for the save on its way, if any. All ranks call it.

        Raises:
            AgreedError: it cannot be written.
        """
        for _ in ("files", "commit"):
            if self._job is not None:
                wait([self._job])
            self.settle(*distributed.all_reduce_sum(self.report(), self.zero.device))

    def fail(self, path: Path, error: OSError) -> None:
        """Have all ranks end at the next step for what went wrong on this one."""
        self._failure = self._failure or refused(path, error)

    def _error(self) -> BaseException | None:
        return self._job.exception() if self._job is not None and self._job.done() else None

    def _give_up(self) -> None:
        if self._job is not None:
            wait([self._job])
        error = self._failure or self._error()
        found = distributed.all_gather_object(None if error is None else f"{distributed.rank_label()}: {error}")
        if distributed.is_main_process() and self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        raise AgreedError(next(text for text in found if text is not None)) from error

    def _write(self, partial: Path, files: dict[str, Any]) -> None:
        """In the thread: this rank's files, then the list of their sizes."""
        sizes = {name: write(partial / name, content) for name, content in files.items()}
        write(_list(partial, distributed.rank()), json.dumps(sizes).encode())

    def _common_files(self, state: dict[str, Any]) -> dict[str, bytes]:
        zero = self.zero
        facts = {
            "ranks": distributed.world_size(),
            **asdict(self.model),
            "vocabulary_parameters": zero.vocabulary_names(),
            "tied": zero.tied,
            "model_signature": layout.model_signature(zero.engine.module),
        }
        files = {
            "trainer_state.json": json.dumps(state | facts, indent=1).encode(),
            "config.yaml": layout.recipe_yaml(self.config).encode(),
        }
        if zero.running_means is not None:
            files["centres.safetensors"] = save({"means": zero.running_means.means, "seen": zero.running_means.seen})
        return files

    def _commit(self, partial: Path) -> None:
        """In rank 0's thread, when all ranks have written: make the checkpoint count, and retire the oldest."""
        sizes = _all_sizes(partial, distributed.world_size())
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        limit = self.config.training.save_total_limit
        try:
            for name, part in self.pretrained.items():
                part.save_pretrained(partial / name)
                for file in (partial / name).rglob("*"):
                    sync(file)
                    if file.is_file():
                        sizes[str(file.relative_to(partial))] = file.stat().st_size
            marker = {"id": uuid.uuid4().hex, "files": dict(sorted(sizes.items()))}
            write_atomically(partial / COMPLETE_MARKER, json.dumps(marker, indent=1).encode())
            _rename(partial, final, limit)
        except OSError as error:
            raise refused(partial, error) from error
        self._copy(final, limit)

    def _copy(self, final: Path, limit: int) -> None:
        """Into training.copy_checkpoints_to; a failure there is a warning, the run goes on."""
        place = self.config.training.copy_checkpoints_to
        if place is None or layout.damage(target := Path(place) / final.name) is None:
            return
        partial = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(final, partial)
            for file in partial.rglob("*"):
                sync(file)
            _rename(partial, target, limit)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror or str(error).splitlines()[0]
            print(f"warning: {final.name} not copied to {place}: {reason}; training goes on", flush=True)


def _rename(partial: Path, final: Path, limit: int) -> None:
    """Make a finished checkpoint count, and drop the oldest beyond `limit`; never replaces a whole one."""
    sync(partial)
    if final.exists():
        if layout.damage(final) is None:
            shutil.rmtree(partial)
            return
        layout.remove(final)
    os.replace(partial, final)
    sync(final.parent)
    layout.retire(final.parent, limit)


def _list(partial: Path, rank: int) -> Path:
    return partial / f"files-{rank}.json"


def _all_sizes(partial: Path, ranks: int) -> dict[str, int]:
    """Name and size of all ranks' files; the lists go.

    Raises:
        UserError: a rank's list does not show here.
    """
    sizes: dict[str, int] = {}
    deadline = time.monotonic() + VISIBLE_SECONDS
    for rank in range(ranks):
        while not _list(partial, rank).exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{partial}: the files of rank {rank} do not show on this host; "
                    "output_dir must be on a filesystem that all nodes share"
                )
            time.sleep(0.5)
        sizes |= json.loads(_list(partial, rank).read_text())
        _list(partial, rank).unlink()
    return sizes


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state

"""Log of finished generations in OUTPUT/generations.partial, from which an interrupted evaluation resumes."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint.export_record import ExportRecord, read_export_record
from pipeline.common import distributed
from pipeline.common.atomic_io import read_json_or_none, write_atomically, write_json
from pipeline.common.errors import UserError, storage_errors, write_error

FOLDER, INPUTS_FILE, MERGED_FILE = "generations.partial", "facts.json", "earlier.jsonl"
SET_ASIDE = f"{FOLDER}.old"  # the log of an earlier evaluation with other inputs
LOADING_FILE = "loading.json"  # record of the export that an evaluation is loading


class Generation(NamedTuple):
    """A generated response.

    Attributes:
        text: the response without special tokens and reasoning.
        finished: whether the model generated a stop token. If not, the response was truncated at max_new_tokens.
        tokens: number of generated tokens without the stop token, as far as a server reports it.
        reasoning: reasoning before the response, or None.
    """

    text: str
    finished: bool
    tokens: int | None = None
    reasoning: str | None = None


class GenerationLog:
    """Generations of earlier runs of the same evaluation, and the file to which this rank appends new ones.

    The constructor is collective: all ranks must call it.

    Args:
        output: directory for the results.
        inputs: everything that determines the generations, as JSON. A log with different inputs is moved to
            OUTPUT/generations.partial.old, which replaces an older one there, unless it has no generations.

    Attributes:
        generations: generations of all ranks in earlier runs, by index of the response.

    Raises:
        UserError: the log cannot be written.
    """

    def __init__(self, output: Path, inputs: Mapping[str, Any]) -> None:
        self.folder = output / FOLDER
        self.generations: dict[int, Generation] = distributed.broadcast_from_rank0(
            lambda: self._merge_rank_files(dict(inputs))
        )
        self._file = open(self.folder / f"rank-{distributed.rank()}.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _merge_rank_files(self, inputs: dict[str, Any]) -> dict[int, Generation]:
        """Merge the files of all ranks, so that the evaluation can resume with a different world size.

        Moves its files away first if they were written with different inputs. Called on rank 0 only.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            if read_json_or_none(self.folder / INPUTS_FILE) != inputs:
                self._set_aside()
            files = sorted(self.folder.glob("*.jsonl"))
            generations = dict(item for file in files for item in _read_log(file))
            write_atomically(self.folder / MERGED_FILE, _format_lines(generations).encode())
            for file in files:
                if file.name != MERGED_FILE:
                    file.unlink()
            write_json(self.folder / INPUTS_FILE, inputs)
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}; fix it or give another --output") from error
        return generations

    def _set_aside(self) -> None:
        """Move the log of an earlier evaluation away, and print where it is. Delete it if it has no generations."""
        files = [file for file in self.folder.iterdir() if file.name != LOADING_FILE]
        if not any(file.stat().st_size for file in files if file.suffix == ".jsonl"):
            for file in files:
                file.unlink()
            return
        old = self.folder.with_name(SET_ASIDE)
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        for file in files:
            file.rename(old / file.name)
        print(
            f"note: {self.folder}: an unfinished evaluation with other settings, data, model or library versions; "
            f"moved to {old}",
            flush=True,
        )

    def add(self, generations: Mapping[int, Generation]) -> None:
        """Append a finished batch to this rank's file.

        Raises:
            UserError: the file cannot be written.
        """
        with storage_errors(self.folder, write_error):
            self._file.write(_format_lines(generations))
            self._file.flush()

    def remove(self) -> None:
        """Delete the log once the results are written. Call on rank 0 only."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read_inputs(output: Path) -> dict[str, Any] | None:
    """Return the inputs of the interrupted evaluation that wrote to a directory, or None if there is none."""
    return read_json_or_none(output / FOLDER / INPUTS_FILE)


@contextmanager
def protect_export(output: Path, export: ExportRecord | None) -> Iterator[None]:
    """Mark an exported model as being loaded for the duration of the block, so that its run does not replace it.

    The block must construct the `GenerationLog`, which marks it from then on. Collective: all ranks must call it.

    Args:
        output: directory for the results. If it does not exist yet, it is not where a run looks.
        export: record of the export, or None for any other model.
    """
    mark = output / FOLDER / LOADING_FILE

    def write() -> None:
        if export is not None and output.is_dir():
            with suppress(OSError):  # the log cannot be written either, which ends the evaluation
                mark.parent.mkdir(exist_ok=True)
                write_json(mark, dataclasses.asdict(export))

    distributed.broadcast_from_rank0(write)
    try:
        yield
        distributed.barrier()  # all ranks have loaded the model
    finally:
        if distributed.is_main_process() and mark.exists():
            mark.unlink()
            with suppress(OSError):  # other files are there
                mark.parent.rmdir()


def find_evaluation(model: Path) -> Path | None:
    """Return the log of an evaluation of an export that has begun, or None.

    It is looked for in the directory of the run, where slurm/evaluate.sh writes its results, and in that of the export.
    """
    record = read_export_record(model)
    if record is None:
        return None
    for folder in (model.parent / FOLDER, model / FOLDER):
        logged = (read_json_or_none(folder / INPUTS_FILE) or {}).get("model")
        exports = [logged.get("export") if isinstance(logged, dict) else None, read_json_or_none(folder / LOADING_FILE)]
        if dataclasses.asdict(record) in exports:
            return folder
    return None


def _format_lines(generations: Mapping[int, Generation]) -> str:
    return "".join(json.dumps([index, *generation]) + "\n" for index, generation in generations.items())


def _read_log(path: Path) -> list[tuple[int, Generation]]:
    """Read all complete lines. An incomplete last line, left by a killed process, is skipped."""
    text = path.read_text(encoding="utf-8")
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [(index, Generation(*generation)) for index, *generation in rows]

"""Log of finished generations in OUTPUT/generations.partial, from which an interrupted evaluation resumes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common import distributed
from pipeline.common.atomic_io import read_json_or_none, write_atomically, write_json
from pipeline.common.errors import UserError

FOLDER, INPUTS_FILE, MERGED_FILE = "generations.partial", "facts.json", "earlier.jsonl"


class Generation(NamedTuple):
    """A generated response.

    Attributes:
        text: the response without special tokens.
        finished: whether the model generated a stop token. If not, the response was truncated at max_new_tokens.
    """

    text: str
    finished: bool


class GenerationLog:
    """Generations of earlier runs of the same evaluation, and the file to which this rank appends new ones.

    The constructor is collective: all ranks must call it.

    Args:
        output: directory for the results.
        inputs: everything that determines the generations, as JSON. Generations logged with different inputs are
            deleted.

    Attributes:
        generations: generations of all ranks in earlier runs, by example index.

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

        Deletes the folder first if it was written with different inputs. Called on rank 0 only.
        """
        try:
            if read_json_or_none(self.folder / INPUTS_FILE) != inputs:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
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

    def add(self, generations: Mapping[int, Generation]) -> None:
        """Append a finished batch to this rank's file."""
        self._file.write(_format_lines(generations))
        self._file.flush()

    def remove(self) -> None:
        """Delete the log once the results are written. Call on rank 0 only."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read_inputs(output: Path) -> dict[str, Any] | None:
    """Return the inputs of the interrupted evaluation that wrote to a directory, or None if there is none."""
    return read_json_or_none(output / FOLDER / INPUTS_FILE)


def _format_lines(generations: Mapping[int, Generation]) -> str:
    return "".join(json.dumps([index, *generation]) + "\n" for index, generation in generations.items())


def _read_log(path: Path) -> list[tuple[int, Generation]]:
    """Read all complete lines. An incomplete last line, left by a killed process, is skipped."""
    text = path.read_text(encoding="utf-8")
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [(index, Generation(text, finished)) for index, text, finished in rows]

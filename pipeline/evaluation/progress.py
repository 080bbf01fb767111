"""Generations of an evaluation that has not ended: kept in OUTPUT/generations.partial, so that a restart goes on."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common import distributed
from pipeline.common.atomic_io import read_json_or_none, write_atomically, write_json
from pipeline.common.errors import UserError

FACTS, EARLIER = "facts.json", "earlier.jsonl"


class Generation(NamedTuple):
    """A generated response: its text, and whether the model ended it itself (else it was cut at max_new_tokens)."""

    text: str
    finished: bool


class Finished:
    """What all ranks generated before this start, in `generations`, and the file that this rank adds to.

    Args:
        output: directory of the results. facts: all that decides the generations; those of other facts are dropped.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, output: Path, facts: Mapping[str, Any]) -> None:
        self.folder = output / "generations.partial"
        self.generations: dict[int, Generation] = distributed.broadcast_from_rank0(lambda: self._collect(dict(facts)))
        self._file = open(self.folder / f"rank-{distributed.rank()}.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _collect(self, facts: dict[str, Any]) -> dict[int, Generation]:
        """On rank 0: what is there, now in one file, so that each start may have another number of ranks."""
        try:
            if read_json_or_none(self.folder / FACTS) != facts:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            files = sorted(self.folder.glob("*.jsonl"))
            found = dict(item for file in files for item in _read(file))
            write_atomically(self.folder / EARLIER, _lines(found).encode())
            for file in files:
                if file.name != EARLIER:
                    file.unlink()
            write_json(self.folder / FACTS, facts)
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}; mend it or give another --output") from error
        return found

    def has(self, batch: Iterable[int]) -> bool:
        """Whether all records of a batch are there."""
        return all(index in self.generations for index in batch)

    def add(self, generations: Mapping[int, Generation]) -> None:
        """Keep a finished batch."""
        self._file.write(_lines(generations))
        self._file.flush()

    def remove(self) -> None:
        """On rank 0, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _lines(generations: Mapping[int, Generation]) -> str:
    return "".join(json.dumps([index, *generation]) + "\n" for index, generation in generations.items())


def _read(path: Path) -> list[tuple[int, Generation]]:
    """Whole lines; a last one that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8")
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [(index, Generation(text, finished)) for index, text, finished in rows]

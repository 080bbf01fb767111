"""Evaluate a model: generate, score, write the result files."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from pipeline.common import distributed
from pipeline.common.atomic_io import ensure_writable, sha256_file, write_atomically
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.evaluation.accuracy import accuracy_table, summarise, versions
from pipeline.evaluation.answer_extraction import answers_equal, extract_answer
from pipeline.evaluation.consistency import beyond_accuracy, consistency_tables
from pipeline.evaluation.dataset import Problem, read_problems
from pipeline.evaluation.generation import generate, load_model
from pipeline.evaluation.progress import Finished, Generation
from pipeline.evaluation.settings import Settings
from pipeline.fault_tolerance.signals import StopSignal


def evaluate(settings: Settings, stop: StopSignal | None = None) -> int:
    """Generate, score and write `evaluation.json`, `evaluation.md` and `generations.jsonl`. Returns the exit status.

    After a signal to any rank nothing is scored: the status is 75, and the next start goes on from the batches that are
    finished. A rank without the signal finishes its share first.

    Raises UserError for a missing or unusable model, a bad record, an unwritable output directory.
    """
    problems = read_problems(Path(settings.data), settings.limit)
    output = Path(settings.output or settings.model)
    with _process_group() as (rank, world_size):
        model, tokenizer = load_model(Path(settings.model), settings.dtype)
        ensure_writable(output)
        finished = Finished(output, _facts(settings))
        mine = generate(model, tokenizer, problems, settings, rank, world_size, finished, stop)
        generations = finished.generations | (_gather(mine, rank, world_size) or {})
        complete = distributed.broadcast_from_rank0(lambda: len(generations) == len(problems))
    if not complete:
        return STOPPED_BY_SIGNAL
    if rank != 0:
        return 0
    rows = [_row(problem, generations[i]) for i, problem in enumerate(problems)]
    result = {
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        **summarise(
            problems, [extract_answer(generations[i].text, p.lang) for i, p in enumerate(problems)], settings.pivot
        ),
        **beyond_accuracy(rows),
    }
    text = f"{accuracy_table(result)}\n\n{consistency_tables(result)}"
    _write(output / "generations.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _write(output / "evaluation.md", f"# Evaluation of {settings.model}\n\n{text}\n")
    _write(output / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    finished.remove()
    print(f"{text}\n\nwritten: {output}/evaluation.json, evaluation.md, generations.jsonl", flush=True)
    return 0


def _facts(settings: Settings) -> dict[str, Any]:
    """What decides the generations: settings, test records, and size and time of the model's files."""
    files = sorted(path for path in Path(settings.model).iterdir() if path.is_file())
    return {
        "settings": dataclasses.asdict(dataclasses.replace(settings, output=None)),
        "data": sha256_file(Path(settings.data)),
        "model": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "versions": versions(),
    }


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """Rank and world size: those of the launcher, with a process group, or 0 and 1."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield 0, 1
        return
    # gloo on GPUs too: only texts are exchanged, once. Ranks end apart from each other, hence the patience.
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    try:
        yield torch.distributed.get_rank(), world_size
    finally:
        torch.distributed.destroy_process_group()


def _gather(mine: dict[int, Generation], rank: int, world_size: int) -> dict[int, Generation] | None:
    """All ranks' generations on rank 0, None on the others."""
    if world_size == 1:
        return mine
    parts: list[Any] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(mine, parts)
    return None if parts is None else {i: generation for part in parts for i, generation in part.items()}


def _row(problem: Problem, generation: Generation) -> dict[str, Any]:
    answer = extract_answer(generation.text, problem.lang)
    return {
        "pair_id": problem.pair_id,
        "lang": problem.lang,
        "output": generation.text,
        "finished": generation.finished,
        "answer": None if answer is None else str(answer),
        "gold": str(problem.gold),
        "correct": answers_equal(answer, problem.gold),
    }


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8", "replace"))  # half a surrogate pair must not lose the run

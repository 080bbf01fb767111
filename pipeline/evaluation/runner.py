"""Evaluate a model: generate responses, score them, and write the result files."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from pipeline.checkpoint.export_record import check_not_stale, read_export_record
from pipeline.common import distributed
from pipeline.common.atomic_io import ensure_writable, sha256_file, write_atomically
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.evaluation.accuracy import (
    accuracy_table,
    score_by_language,
    unfinished_sentence,
    unfinished_warning,
    versions,
)
from pipeline.evaluation.answers.answer_types import TYPES
from pipeline.evaluation.consistency import consistency_metrics, consistency_tables
from pipeline.evaluation.dataset import Example, read_examples
from pipeline.evaluation.details import detail_metrics, detail_tables
from pipeline.evaluation.generation import encode_prompts, generate_batches, load_for_generation, plan_batches
from pipeline.evaluation.progress import Generation, GenerationLog, protect_export, read_inputs
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.evaluation.truncation import truncation_warning
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.models.fingerprint import model_fingerprint


def evaluate(settings: EvaluationSettings, stop: StopSignal | None = None) -> int:
    """Generate, score and write `evaluation.json`, `evaluation.md` and `generations.jsonl`.

    If any rank receives a signal, nothing is scored, and the next run resumes after the finished batches. Ranks that
    did not receive the signal finish their batches before exiting.

    Returns:
        The exit status: 0, or 75 after a signal.

    Raises:
        UserError: the model is missing or cannot be used, a record is malformed, or the output directory is not
            writable.
    """
    examples = read_examples(Path(settings.data), settings.limit)
    output = Path(settings.output or settings.model)
    with _process_group():
        # On one rank, because a checkpoint may be completed between the checks of two.
        distributed.broadcast_from_rank0(lambda: _check_may_evaluate(settings))
        with protect_export(output, read_export_record(Path(settings.model))):
            model, tokenizer = load_for_generation(Path(settings.model), settings.dtype)
            prompts = encode_prompts(tokenizer, examples, settings.chat_template_kwargs)
            ensure_writable(output)
            identity = distributed.broadcast_from_rank0(lambda: _model_identity(Path(settings.model), model.dtype))
            log = GenerationLog(output, _inputs(settings, identity))
        batches = plan_batches(
            prompts, settings.batch_size, log.generations, distributed.rank(), distributed.world_size()
        )
        finished_batches = generate_batches(model, tokenizer, prompts, batches, settings.max_new_tokens)
        local = _collect(finished_batches, log, stop)
        generations = log.generations | (_gather_generations(local) or {})
        complete = distributed.broadcast_from_rank0(lambda: len(generations) == len(examples))
        is_main_process = distributed.is_main_process()
    if not complete:
        return STOPPED_BY_SIGNAL
    if is_main_process:
        _write_results(settings, identity, output, examples, [generations[i] for i in range(len(examples))])
        log.remove()
    return 0


def can_resume(settings: EvaluationSettings) -> bool:
    """Return whether an interrupted evaluation with these settings has begun with the present export of its run."""
    logged = read_inputs(Path(settings.output or settings.model))
    if logged is None or not isinstance(logged.get("model"), dict):
        return False
    # The data type and the fingerprint are compared when the model has been loaded.
    model = logged["model"] | {"export": _export_record(Path(settings.model))}
    return logged == _inputs(settings, model)


def _check_may_evaluate(settings: EvaluationSettings) -> None:
    """Check that an export is not stale, unless it has been evaluated in part already.

    Raises:
        UserError: the run has a newer checkpoint, or the record of the export is damaged.
    """
    if not settings.allow_stale and not can_resume(settings):
        check_not_stale(Path(settings.model))


def _export_record(path: Path) -> dict[str, Any] | None:
    record = read_export_record(path)
    return dataclasses.asdict(record) if record else None


def _model_identity(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return the entry `model` of `evaluation.json`: data type, fingerprint, and the record of an export, if any."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "fingerprint": model_fingerprint(path),
        "export": _export_record(path),
    }


def _inputs(settings: EvaluationSettings, model: dict[str, Any]) -> dict[str, Any]:
    """Return everything that determines the generations: settings, test data, model and library versions."""
    return {
        "settings": dataclasses.asdict(dataclasses.replace(settings, output=None, allow_stale=False)),
        "data": sha256_file(Path(settings.data)),
        "model": model,
        "versions": versions(),
    }


@contextmanager
def _process_group() -> Iterator[None]:
    """Initialize the process group for the duration of the block if there are several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # gloo even on GPUs, because only text is exchanged, once. Ranks finish at different times, hence the long timeout.
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _collect(
    batches: Iterator[dict[int, Generation]], log: GenerationLog, stop: StopSignal | None
) -> dict[int, Generation]:
    """Generate and log batches until all are finished or a signal is received."""
    generations: dict[int, Generation] = {}
    while not (stop and stop.received) and (batch := next(batches, None)) is not None:
        log.add(batch)
        generations.update(batch)
    return generations


def _gather_generations(local: dict[int, Generation]) -> dict[int, Generation] | None:
    """Gather the generations of all ranks on rank 0. Return None on the other ranks.

    Collective: all ranks must call it.
    """
    if not torch.distributed.is_initialized():
        return local
    parts: list[Any] | None = [None] * distributed.world_size() if distributed.is_main_process() else None
    torch.distributed.gather_object(local, parts)
    return None if parts is None else {i: generation for part in parts for i, generation in part.items()}


def _write_results(
    settings: EvaluationSettings,
    model: dict[str, Any],
    output: Path,
    examples: list[Example],
    generations: list[Generation],
) -> None:
    readings = [
        TYPES[example.answer_type].extract(generation.text, example.lang, generation.finished, example.choices)
        for example, generation in zip(examples, generations, strict=True)
    ]
    answers = [reading.answer for reading in readings]
    rows = [
        {
            "pair_id": example.pair_id,
            "lang": example.lang,
            "output": generation.text,
            "finished": generation.finished,
            "tokens": generation.tokens,
            "answer": None if reading.answer is None else str(reading.answer),
            "read_by": reading.read_by,
            "answer_type": example.answer_type,
            "gold": str(example.gold),
            "correct": TYPES[example.answer_type].equal(reading.answer, example.gold),
        }
        for example, generation, reading in zip(examples, generations, readings, strict=True)
    ]
    finished = [generation.finished for generation in generations]
    result = {
        "unfinished": finished.count(False),
        "settings": dataclasses.asdict(settings),
        "model": model,
        "versions": versions(),
        **score_by_language(examples, answers, finished, settings.pivot),
        **consistency_metrics(rows, settings.pivot),
        **detail_metrics(rows),
    }
    text = f"{unfinished_sentence(result)} The model ran in {model['dtype']}."
    text += f"\n\n{accuracy_table(result)}\n\n{consistency_tables(result)}"
    text += f"\n\n{detail_tables(result)}"
    _write(output / "generations.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _write(output / "evaluation.md", f"# Evaluation of {settings.model}\n\n{text}\n")
    _write(output / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"{text}\n\nwritten: {output}/evaluation.json, evaluation.md, generations.jsonl", flush=True)
    for warning in (truncation_warning(result), unfinished_warning(result)):
        if warning:
            print(warning, flush=True)


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8", "replace"))  # a lone surrogate must not make the run fail

"""Score the responses of an evaluation and write the three result files."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import storage_errors, write_error
from pipeline.evaluation.accuracy import (
    accuracy_table,
    score_by_language,
    unfinished_sentence,
    unfinished_warning,
    versions,
)
from pipeline.evaluation.answers.answer_types import TYPES
from pipeline.evaluation.consistency import consistency_metrics, consistency_tables
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.details import detail_metrics, detail_tables
from pipeline.evaluation.progress import Generation
from pipeline.evaluation.sampling_statistics import (
    majority_vote,
    sampling_metrics,
    sampling_table,
    with_mean_accuracy,
)
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.evaluation.truncation import truncation_warning


def write_results(
    settings: EvaluationSettings,
    model: dict[str, Any],
    output: Path,
    examples: Sequence[Example],
    generations: Sequence[Generation],
) -> None:
    """Score the responses, write the result files, and print the tables.

    Args:
        settings: the settings of the evaluation.
        model: the entry `model` of `evaluation.json`.
        output: directory for the result files.
        examples: the examples that were asked.
        generations: `settings.num_samples` responses to each example.
    """
    n = settings.num_samples
    scored = [_score(example, generations[i * n : (i + 1) * n]) for i, example in enumerate(examples)]
    rows = [row for row, _ in scored]
    answers = [answer for _, answer in scored]
    # Scores of one answer per example: that of the only response, or of the majority of all.
    votes = [{**row, "correct": row["vote_correct"]} if n > 1 else row for row in rows]
    finished = [row["finished"] for row in rows]
    scores = score_by_language(examples, answers, finished, settings.pivot)
    sampling = None
    if n > 1:
        sampling = sampling_metrics(rows, n)
        scores = with_mean_accuracy(scores, sampling)
    result = {
        "unfinished": sum(not generation.finished for generation in generations),
        "settings": dataclasses.asdict(settings),
        "model": model,
        "versions": versions(),
        **scores,
        **({"sampling": sampling} if sampling else {}),
        **consistency_metrics(votes, settings.pivot),
        **detail_metrics(rows),
    }
    text = f"{unfinished_sentence(result)} {_model_sentence(model)}\n\n{accuracy_table(result)}"
    if sampling:
        text += f"\n\n{_SAMPLES}\n\n{sampling_table(sampling)}"
    text += f"\n\n{consistency_tables(result)}\n\n{detail_tables(result)}"
    _write(output / "generations.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _write(output / "evaluation.md", f"# Evaluation of {settings.model}\n\n{text}\n")
    _write(output / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"{text}\n\nwritten: {output}/evaluation.json, evaluation.md, generations.jsonl", flush=True)
    for warning in (truncation_warning(result), unfinished_warning(result)):
        if warning:
            print(warning, flush=True)


_SAMPLES = (
    "The accuracy is the mean over all samples. A problem counts as unfinished if one of its samples is. Agreement is "
    "that of the majority votes."
)


def _score(example: Example, generations: Sequence[Generation]) -> tuple[dict[str, Any], Any]:
    """Return the row of `generations.jsonl`, and the answer of the only response or of the majority of all."""
    kind = TYPES[example.answer_type]
    readings = [
        kind.extract(response.text, example.lang, response.finished, example.choices) for response in generations
    ]
    answers = [reading.answer for reading in readings]
    vote = majority_vote(answers, kind.equal)
    chosen = vote or 0
    samples: list[dict[str, Any]] = [
        {
            "output": generation.text,
            "finished": generation.finished,
            "answer": None if reading.answer is None else str(reading.answer),
            "read_by": reading.read_by,
            "correct": kind.equal(reading.answer, example.gold),
            "tokens": generation.tokens,
            **({} if generation.reasoning is None else {"reasoning": generation.reasoning}),
        }
        for generation, reading in zip(generations, readings, strict=True)
    ]
    row: dict[str, Any] = {"pair_id": example.pair_id, "lang": example.lang, **samples[chosen]}
    row |= {"answer_type": example.answer_type, "gold": str(example.gold)}
    if len(samples) > 1:
        row["finished"] = all(sample["finished"] for sample in samples)
        row["vote_correct"] = row["correct"]
        row["correct"] = sum(sample["correct"] for sample in samples) / len(samples)
        row["samples"] = samples
    return row, answers[chosen]


def _model_sentence(model: dict[str, Any]) -> str:
    if "server" in model:
        return f"The model {model['name']} was served by {model['server']}."
    return f"The model ran in {model['dtype']}."


def _write(path: Path, text: str) -> None:
    with storage_errors(path, write_error):
        write_atomically(path, text.encode("utf-8", "replace"))  # a lone surrogate must not make the run fail

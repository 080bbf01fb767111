"""Read the scored answers of evaluated runs, and pair those of several runs by example."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.common.errors import UserError

# Settings of an evaluation that change what a model generates. The number of examples counts only with few_shot.
GENERATION_SETTINGS = [
    *("max_new_tokens", "temperature", "top_p", "num_samples"),
    *("chat_template", "chat_template_kwargs", "few_shot", "num_shots"),
]

ScoredAnswers = dict[tuple[str, str], dict[str, Any]]  # (pair_id, lang) to the values of `read_generations`


class PairedScores(NamedTuple):
    """Scores of several runs on the examples that they have in common.

    Attributes:
        languages: the L language codes, sorted.
        correct: [R, G, L] over runs, example groups and languages: 1 correct, 0 wrong, the fraction of correct answers
            if there are several to a question, nan if the group has no example in the language.
        unfinished: [R, L] numbers of responses that were cut at the token limit.
        responses: [R] numbers of responses, of which there may be several to an example.
        records: number of examples in common.
        left_out: number of examples that at least one run lacks.
        dtype: data type in which all models ran.
        different_settings: settings of the evaluations that differ, with the value of each run.
    """

    languages: list[str]
    correct: np.ndarray
    unfinished: np.ndarray
    responses: np.ndarray
    records: int
    left_out: int
    dtype: str
    different_settings: dict[str, list[Any]]


def read_paired_scores(runs: Sequence[Path]) -> PairedScores:
    """Read the answers of runs and pair them by `pair_id` and language.

    Args:
        runs: directories of the runs, or their `generations.jsonl`.

    Raises:
        UserError: a file is missing or damaged, or the runs have no record in common, different gold answers or
            different data types.
    """
    answers, evaluations = [read_generations(run) for run in runs], [read_evaluation(run) for run in runs]
    first, dtype = answers[0], str(evaluations[0]["model"]["dtype"])
    for run, evaluation in zip(runs, evaluations, strict=True):
        if (other := evaluation["model"]["dtype"]) != dtype:
            by_server = ["server" in each["model"] for each in (evaluation, evaluations[0])]
            remedy = "with the same --dtype" if by_server[0] == by_server[1] else "by a server, or neither"
            raise UserError(f"{run}: ran in {other}, but {runs[0]} in {dtype}; evaluate both {remedy}")
    common = [key for key in first if all(key in other for other in answers)]
    if not common:
        raise UserError(f"{runs[-1]}: no record in common with {runs[0]}; evaluate both on the same data")
    groups = {pair_id: row for row, pair_id in enumerate(dict.fromkeys(pair_id for pair_id, _ in common))}
    languages = {lang: column for column, lang in enumerate(sorted({lang for _, lang in common}))}
    correct = np.full((len(runs), len(groups), len(languages)), np.nan)
    unfinished, responses = np.zeros((len(runs), len(languages)), dtype=int), np.zeros(len(runs), dtype=int)
    for number, (run, scored) in enumerate(zip(runs, answers, strict=True)):
        for pair_id, lang in common:
            answer = scored[pair_id, lang]
            if answer["gold"] != first[pair_id, lang]["gold"]:
                raise UserError(
                    f"{run}: pair_id {pair_id!r}, {lang}: a gold answer that differs from {runs[0]}; "
                    "evaluate both on the same data"
                )
            correct[number, groups[pair_id], languages[lang]] = answer["correct"]
            unfinished[number, languages[lang]] += answer["unfinished"]
            responses[number] += answer["responses"]
    left_out = len(set().union(*answers)) - len(common)
    different = different_settings(evaluations)
    return PairedScores(list(languages), correct, unfinished, responses, len(common), left_out, dtype, different)


def read_generations(path: Path) -> ScoredAnswers:
    """Read the `generations.jsonl` of a run. `path` is the file or its directory.

    Returns:
        For each (pair_id, lang), whether the answer is `correct` (or the fraction of correct answers), the numbers of
        `responses` and of those that are `unfinished`, and the `gold` answer.

    Raises:
        UserError: the file is missing, empty or malformed; the message names the file and the row.
    """
    path = path / "generations.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; python -m pipeline.evaluation writes it")
    answers: ScoredAnswers = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; run pipeline.evaluation again") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            finished = [sample["finished"] for sample in row.get("samples") or [row]]
            if not all(isinstance(value, bool) for value in finished) or not 0 <= row["correct"] <= 1:
                raise TypeError
            counts = {"responses": len(finished), "unfinished": finished.count(False)}
            answers[row["pair_id"], row["lang"]] = {"correct": row["correct"], "gold": row["gold"], **counts}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} row {number}: not a row of pipeline.evaluation; run that again") from None
    if not answers:
        raise UserError(f"{path}: empty file; run pipeline.evaluation again")
    return answers


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the content of the `evaluation.json` of a run, which has the data type of the model.

    Args:
        path: directory of the run, or its `generations.jsonl`.

    Raises:
        UserError: the file is missing, or was written by an older version.
    """
    path = (path if path.is_dir() else path.parent) / "evaluation.json"
    try:
        evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        evaluation["model"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: missing, or without the model's dtype; run pipeline.evaluation again") from None
    return evaluation


def different_settings(evaluations: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that change what a model generates and differ, with the value of each evaluation."""
    settings = [evaluation.get("settings") or {} for evaluation in evaluations]
    names = [name for name in GENERATION_SETTINGS if name != "num_shots" or any(s.get("few_shot") for s in settings)]
    values = {name: [s.get(name) for s in settings] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def read_seed(path: Path) -> int | None:
    """Return the seed of a training run from its `config.yaml`, or None if it has none.

    Args:
        path: directory of the run, or its `generations.jsonl`.
    """
    path = (path if path.is_dir() else path.parent) / "config.yaml"
    try:
        seed = yaml.safe_load(path.read_text(encoding="utf-8"))["seed"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return seed if isinstance(seed, int) else None

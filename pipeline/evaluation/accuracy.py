"""Compute accuracy per language, format it as a table, and list the library versions it depends on."""

import platform
from collections import Counter
from collections.abc import Collection, Sequence
from importlib import metadata
from statistics import fmean
from typing import Any, NamedTuple

from pipeline.evaluation.answers.answer_types import answers_agree, answers_equal
from pipeline.evaluation.answers.candidates import Answer
from pipeline.evaluation.answers.language_rules import base_language
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.significance import wilson_interval

UNFINISHED_WARNING = 0.03  # fraction of unfinished responses above which the scores say little


class LanguageScore(NamedTuple):
    """Accuracy in one language. All proportions are in [0, 1].

    Attributes:
        n: number of examples.
        unfinished: number of responses that were cut at the token limit.
        correct: number of correct answers.
        accuracy: `correct` / `n`.
        low: lower bound of the accuracy's 95 % Wilson interval.
        high: upper bound of that interval.
        consistency_with_pivot: proportion of questions with the same answer as in the pivot, among the questions asked
            in both languages. None for the pivot itself, and if there are no such questions.
    """

    n: int
    unfinished: int
    correct: int
    accuracy: float
    low: float
    high: float
    consistency_with_pivot: float | None


def score_by_language(
    examples: Sequence[Example], answers: Sequence[Answer | None], finished: Sequence[bool], pivot: str
) -> dict[str, Any]:
    """Score answers per language (in alphabetical order) and average over languages.

    Args:
        examples: the examples that were asked.
        answers: the extracted answer to each example, or None if none was found.
        finished: whether the model ended each response with a stop token.
        pivot: language to compare the answers in other languages with.

    Returns:
        The entries `pivot`, `languages` and `macro` of `evaluation.json`.
    """
    by_lang: dict[str, dict[str, tuple[Answer | None, bool, str]]] = {}
    for example, answer in zip(examples, answers, strict=True):
        is_right = answers_equal(answer, example.gold, example.answer_type)
        by_lang.setdefault(example.lang, {})[example.pair_id] = (answer, is_right, example.answer_type)
    pivot = find_pivot(by_lang, pivot)
    unfinished = Counter(example.lang for example, done in zip(examples, finished, strict=True) if not done)
    scores = {}
    for lang, results in sorted(by_lang.items()):
        correct = sum(is_right for _, is_right, _ in results.values())
        common = [] if lang == pivot else sorted(results.keys() & by_lang.get(pivot, {}).keys())
        agrees = [answers_agree(results[pair_id], by_lang[pivot][pair_id]) for pair_id in common]
        low, high = wilson_interval(correct, len(results))
        consistency = fmean(agrees) if agrees else None
        n = len(results)
        scores[lang] = LanguageScore(n, unfinished[lang], correct, correct / n, low, high, consistency)
    consistencies = [s.consistency_with_pivot for s in scores.values() if s.consistency_with_pivot is not None]
    macro = {
        "accuracy": fmean(score.accuracy for score in scores.values()),
        "consistency_with_pivot": fmean(consistencies) if consistencies else None,
    }
    return {"pivot": pivot, "languages": {lang: score._asdict() for lang, score in scores.items()}, "macro": macro}


def find_pivot(languages: Collection[str], pivot: str) -> str:
    """Return the code of the pivot among the languages of the data: eng_Latn if the pivot is given as en."""
    same = [lang for lang in languages if base_language(lang) == base_language(pivot)]
    return pivot if pivot in languages or len(same) != 1 else same[0]


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage with one decimal, None as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def accuracy_table(evaluation: dict[str, Any]) -> str:
    """Format an evaluation (the content of `evaluation.json`) as a Markdown table, in percent."""
    lines = [
        f"| language | problems | unfinished | accuracy % | 95 % interval | same answer as {evaluation['pivot']} % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for lang, score in evaluation["languages"].items():
        interval = f"{percent(score['low'])} to {percent(score['high'])}"
        consistency = percent(score["consistency_with_pivot"])
        counts = f"{score['n']} | {score['unfinished']}"
        lines.append(f"| {lang} | {counts} | {percent(score['accuracy'])} | {interval} | {consistency} |")
    macro = evaluation["macro"]
    unfinished, total = count_unfinished(evaluation)
    average, consistency = percent(macro["accuracy"]), percent(macro["consistency_with_pivot"])
    lines.append(f"| **mean of languages** | {total} | {unfinished} | **{average}** | | **{consistency}** |")
    return "\n".join(lines)


def count_unfinished(evaluation: dict[str, Any]) -> tuple[int, int]:
    """Return the number of unfinished responses and of all responses of an evaluation."""
    scores = evaluation["languages"].values()
    return sum(score["unfinished"] for score in scores), sum(score["n"] for score in scores)


def unfinished_sentence(evaluation: dict[str, Any]) -> str:
    """Describe in one sentence how many responses are unfinished, in total and per language."""
    unfinished, total = count_unfinished(evaluation)
    if not unfinished:
        return f"All {total} responses are finished."
    languages = evaluation["languages"].items()
    parts = ", ".join(f"{lang} {score['unfinished']}" for lang, score in languages if score["unfinished"])
    limit = evaluation["settings"]["max_new_tokens"]
    return f"{unfinished} of {total} responses are unfinished, cut at {limit} tokens: {parts}."


def unfinished_warning(evaluation: dict[str, Any]) -> str:
    """Return a line that says what to do if many responses are unfinished, or else an empty string."""
    unfinished, total = count_unfinished(evaluation)
    if unfinished <= UNFINISHED_WARNING * total:
        return ""
    return (
        f"warning: {percent(unfinished / total)} % of the responses are unfinished and mostly count as wrong; raise "
        f"--max_new_tokens (now {evaluation['settings']['max_new_tokens']}), or train the model to end its turns"
    )


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the libraries that the metrics depend on."""
    installed = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "deepspeed"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed

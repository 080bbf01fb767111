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
BY_SCRIPT = " †"  # marks a language of which only the script is identified


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
    outputs = evaluation.get("output_languages") or {}
    lines = [
        f"| language | problems | unfinished | accuracy % | 95 % interval | same answer as {evaluation['pivot']} % |"
        + (" in the language % |" if outputs else ""),
        "|---|---:|---:|---:|---:|---:|" + ("---:|" if outputs else ""),
    ]
    for lang, score in evaluation["languages"].items():
        interval = f"{percent(score['low'])} to {percent(score['high'])}"
        consistency = percent(score["consistency_with_pivot"])
        counts = f"{score['n']} | {score['unfinished']}"
        lines.append(f"| {lang} | {counts} | {percent(score['accuracy'])} | {interval} | {consistency} |")
        lines[-1] += f" {in_language_cell(evaluation, lang)} |" if outputs else ""
    macro, scores = evaluation["macro"], evaluation["languages"].values()
    unfinished, total = (sum(score[key] for score in scores) for key in ("unfinished", "n"))
    average, consistency = percent(macro["accuracy"]), percent(macro["consistency_with_pivot"])
    lines.append(f"| **mean of languages** | {total} | {unfinished} | **{average}** | | **{consistency}** |")
    if outputs:
        known = [score["share"] for score in outputs.values() if score["share"] is not None]
        lines[-1] += f" **{percent(fmean(known) if known else None)}** |"
    return "\n".join(lines)


def in_language_cell(evaluation: dict[str, Any], lang: str) -> str:
    """Format the fraction of responses in the language of the question, marked if it is judged by script alone."""
    score = (evaluation.get("output_languages") or {}).get(lang, {})
    return percent(score.get("share")) + (BY_SCRIPT if score.get("judged_by") == "script" else "")


def unfinished_by_language(evaluation: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the number of unfinished responses and of all responses in each language of an evaluation."""
    sampling = evaluation.get("sampling") or {"num_samples": 1, "languages": evaluation["languages"]}
    return {
        lang: (score["unfinished"], score["n"] * sampling["num_samples"])
        for lang, score in sampling["languages"].items()
    }


def count_unfinished(evaluation: dict[str, Any]) -> tuple[int, int]:
    """Return the number of unfinished responses and of all responses of an evaluation."""
    unfinished, responses = zip(*unfinished_by_language(evaluation).values(), strict=True)
    return sum(unfinished), sum(responses)


def unfinished_sentence(evaluation: dict[str, Any]) -> str:
    """Describe in one sentence how many responses are unfinished, in total and per language."""
    unfinished, total = count_unfinished(evaluation)
    if not unfinished:
        return f"All {total} responses are finished."
    parts = ", ".join(f"{lang} {count}" for lang, (count, _) in unfinished_by_language(evaluation).items() if count)
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

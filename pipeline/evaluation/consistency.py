"""Consistency across languages: do the answers to a question agree?

The functions take the rows of `generations.jsonl` or the content of `evaluation.json`, which includes these metrics.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from pipeline.common.errors import UserError
from pipeline.evaluation.accuracy import percent
from pipeline.evaluation.answers.answer_types import answer_from_text, answers_agree
from pipeline.evaluation.answers.candidates import Answer
from pipeline.evaluation.output_languages import language_metrics, output_languages_table
from pipeline.evaluation.significance import wilson_interval

GenerationRow = dict[str, Any]  # row of generations.jsonl: pair_id, lang, output, answer, correct, ...


def consistency_metrics(rows: Sequence[GenerationRow], pivot: str = "en") -> dict[str, Any]:
    """Compute `agreement` and `output_languages`, the latter with the fraction of outputs in the pivot's language.

    If lingua is not installed, print a note and set `output_languages` to None.
    """
    try:
        languages = language_metrics(rows, pivot)
    except UserError as error:
        print(f"the languages of the outputs were not checked: {error}", flush=True)
        languages = None
    return {"agreement": agreement(rows), "output_languages": languages}


def agreement(rows: Sequence[GenerationRow]) -> dict[str, Any]:
    """Compute how often the answers to a question are equal across languages, whether correct or not.

    A missing answer equals no other answer.

    Returns:
        `pairwise`: for each pair of languages, the fraction of equal answers to the questions asked in both; None if
        there are no such questions. `mean_pairwise`: mean over the pairs. `wrong`: counts over all `pairs` of wrong
        answers to one question in two languages, without missing answers: `same` is the number of equal pairs, and
        `share` their fraction, None without pairs. Agreement on correct answers rises with accuracy alone, that on
        wrong ones does not. `all_languages`: counts over the `problems` asked in every language. `same` is the number
        with the same answer in all languages (as a fraction: `share`, with its 95 % Wilson interval `low` to `high`),
        and `correct` the number with the correct answer in all.
    """
    answers: dict[str, dict[str, tuple[Answer | None, bool, str]]] = {}
    wrong: dict[str, set[str]] = {}
    for row in rows:
        answer_type = row.get("answer_type", "number")
        answer = answer_from_text(row["answer"], answer_type)
        answers.setdefault(row["lang"], {})[row["pair_id"]] = (answer, row["correct"], answer_type)
        if not row["correct"]:
            wrong.setdefault(row["lang"], set()).add(row["pair_id"])
    languages = sorted(answers)
    pairwise: dict[str, dict[str, float | None]] = {}
    wrong_pairs: list[bool] = []
    for a, b in combinations(languages, 2):
        common = answers[a].keys() & answers[b].keys()
        equal = sum(answers_agree(answers[a][pair_id], answers[b][pair_id]) for pair_id in common)
        pairwise.setdefault(a, {})[b] = equal / len(common) if common else None
        answered = [(answers[a][i], answers[b][i]) for i in wrong.get(a, set()) & wrong.get(b, set())]
        wrong_pairs += [answers_agree(x, y) for x, y in answered if x[0] is not None and y[0] is not None]
    fractions = [fraction for row in pairwise.values() for fraction in row.values() if fraction is not None]
    complete = set.intersection(*map(set, answers.values())) if len(languages) > 1 else set()
    same = sum(_all_equal([answers[lang][pair_id] for lang in languages]) for pair_id in complete)
    low, high = wilson_interval(same, len(complete)) if complete else (None, None)
    return {
        "pairwise": pairwise,
        "mean_pairwise": fmean(fractions) if fractions else None,
        "wrong": {
            "pairs": len(wrong_pairs),
            "same": sum(wrong_pairs),
            "share": fmean(wrong_pairs) if wrong_pairs else None,
        },
        "all_languages": {
            "problems": len(complete),
            "same": same,
            "correct": len(complete.difference(*wrong.values())),
            "share": same / len(complete) if complete else None,
            "low": low,
            "high": high,
        },
    }


def _all_equal(answers: Sequence[tuple[Answer | None, bool, str]]) -> bool:
    return all(answers_agree(answers[0], other) for other in answers[1:])


def consistency_tables(evaluation: dict[str, Any]) -> str:
    """Format all consistency metrics as Markdown, in percent. Return an empty string if there are none."""
    parts = [agreement_sentences(evaluation), agreement_table(evaluation), output_languages_table(evaluation)]
    return "\n\n".join(part for part in parts if part)


def agreement_sentences(evaluation: dict[str, Any]) -> str:
    """Describe in words the average agreement between two languages and the agreement of all languages.

    Return an empty string if there is nothing to compare.
    """
    metrics = evaluation.get("agreement")
    if not metrics or metrics["mean_pairwise"] is None:
        return ""
    text = f"Two languages give the same answer to a problem in {percent(metrics['mean_pairwise'])} % on average."
    if "wrong" in metrics and metrics["wrong"]["pairs"]:  # absent in results of older versions
        wrong = metrics["wrong"]
        text += (
            f" Two wrong answers to a problem are the same in {percent(wrong['share'])} % of {wrong['pairs']} pairs."
        )
    total = metrics["all_languages"]
    if total["problems"]:
        text += (
            f" All languages give the same answer to {total['same']} of {total['problems']} problems "
            f"({percent(total['share'])} %, {percent(total['low'])} to {percent(total['high'])}); "
            f"it is correct for {total['correct']} of them."
        )
    return text


def agreement_table(evaluation: dict[str, Any]) -> str:
    """Format the pairwise agreement as a Markdown table, in percent. Return an empty string if there is none."""
    matrix = agreement_matrix(evaluation)
    if not matrix:
        return ""
    languages = list(evaluation["languages"])
    lines = [f"| same answer % | {' | '.join(languages)} |", "|---|" + "---:|" * len(languages)]
    for a, row in zip(languages, matrix, strict=True):
        cells = ["" if a == b else percent(fraction) for b, fraction in zip(languages, row, strict=True)]
        lines.append(f"| {a} | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement_matrix(evaluation: dict[str, Any]) -> list[list[float | None]]:
    """Return the [L, L] fractions of equal answers, with None on the diagonal, or [] if there is nothing to compare."""
    metrics, languages = evaluation.get("agreement"), list(evaluation["languages"])
    if not metrics or metrics["mean_pairwise"] is None:
        return []
    pairwise = metrics["pairwise"]
    return [[pairwise.get(a, {}).get(b, pairwise.get(b, {}).get(a)) for b in languages] for a in languages]

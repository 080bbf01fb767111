"""Beyond accuracy: do a problem's answers agree across languages, and is each output in the language asked?

Works on the rows of `generations.jsonl`; see `pipeline.evaluation`, which adds these figures to its results.
"""

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from itertools import combinations
from statistics import fmean
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.accuracy import wilson_interval
from pipeline.evaluation.answer_extraction import LANGUAGES, answers_equal

Row = dict[str, Any]  # of generations.jsonl: pair_id, lang, output, answer, correct, ...


def beyond_accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    """`agreement` and `output_languages` of an evaluation; the latter None, with a note, where lingua is missing."""
    try:
        found = output_languages(rows)
    except UserError as error:
        print(f"the languages of the outputs were not checked: {error}", flush=True)
        found = None
    return {"agreement": agreement(rows), "output_languages": found}


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """How often the answers to one problem are equal, right or wrong; an output without answer agrees with none.

    `pairwise`: by two languages, the share of the problems they have in common; None where they have none.
    `mean_pairwise`: over those pairs. `all_languages`: of the problems that exist in every language, how many have one
    and the same answer in all (`same`) and the right one in all (`correct`), with Wilson's 95 % interval of `same`.
    """
    answers: dict[str, dict[str, Decimal | None]] = {}
    wrong = set()
    for row in rows:
        answers.setdefault(row["lang"], {})[row["pair_id"]] = None if row["answer"] is None else Decimal(row["answer"])
        if not row["correct"]:
            wrong.add(row["pair_id"])
    languages = sorted(answers)
    pairwise: dict[str, dict[str, float | None]] = {}
    for a, b in combinations(languages, 2):
        shared = answers[a].keys() & answers[b].keys()
        equal = sum(answers_equal(answers[a][pair_id], answers[b][pair_id]) for pair_id in shared)
        pairwise.setdefault(a, {})[b] = equal / len(shared) if shared else None
    shares = [share for row in pairwise.values() for share in row.values() if share is not None]
    complete = set.intersection(*(set(found) for found in answers.values())) if len(languages) > 1 else set()
    same = sum(_all_equal([answers[lang][pair_id] for lang in languages]) for pair_id in complete)
    low, high = wilson_interval(same, len(complete)) if complete else (None, None)
    return {
        "pairwise": pairwise,
        "mean_pairwise": fmean(shares) if shares else None,
        "all_languages": {
            "problems": len(complete),
            "same": same,
            "correct": len(complete - wrong),
            "share": same / len(complete) if complete else None,
            "low": low,
            "high": high,
        },
    }


def _all_equal(answers: Sequence[Decimal | None]) -> bool:
    return all(answers_equal(answers[0], other) for other in answers[1:])


def output_languages(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By language asked: in which languages the outputs are, as lingua tells them among those of `LANGUAGES`.

    `found` counts outputs by language, under `none` those in which there is nothing to tell it by, such as bare
    numbers. `share` is that of the language asked among the others, with its 95 % interval; None where all are `none`.
    Raises UserError where lingua is missing.
    """
    lingua = import_optional("lingua")
    codes = {lang: getattr(lingua.IsoCode639_1, lang.upper()) for lang in LANGUAGES}
    detector = lingua.LanguageDetectorBuilder.from_iso_codes_639_1(*codes.values()).build()
    known = {code: lang for lang, code in codes.items()}
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        language = detector.detect_language_of(row["output"])
        name = "none" if language is None else known[language.iso_code_639_1]
        counts.setdefault(row["lang"], Counter())[name] += 1
    described = {}
    for lang, found in sorted(counts.items()):
        told = found.total() - found["none"]
        low, high = wilson_interval(found[lang], told) if told else (None, None)
        share = found[lang] / told if told else None
        described[lang] = {"share": share, "low": low, "high": high, "found": dict(found.most_common())}
    return described


def consistency_tables(evaluation: dict[str, Any]) -> str:
    """All that was found as Markdown, in percent; empty for an evaluation without it."""
    parts = [agreement_sentences(evaluation), agreement_table(evaluation), output_languages_table(evaluation)]
    return "\n\n".join(part for part in parts if part)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def agreement_sentences(evaluation: dict[str, Any]) -> str:
    """Agreement of two languages on average, and of all; empty where there is none to speak of."""
    found = evaluation.get("agreement")
    if not found or found["mean_pairwise"] is None:
        return ""
    text = f"Two languages give the same answer to a problem in {percent(found['mean_pairwise'])} % on average."
    everywhere = found["all_languages"]
    if everywhere["problems"]:
        text += (
            f" All languages give one answer to {everywhere['same']} of {everywhere['problems']} problems "
            f"({percent(everywhere['share'])} %, {percent(everywhere['low'])} to {percent(everywhere['high'])}), the "
            f"right one to {everywhere['correct']}."
        )
    return text


def agreement_table(evaluation: dict[str, Any]) -> str:
    """Agreement of every two languages, in percent."""
    matrix = agreement_matrix(evaluation)
    if not matrix:
        return ""
    languages = list(evaluation["languages"])
    lines = [f"| same answer % | {' | '.join(languages)} |", "|---|" + "---:|" * len(languages)]
    for a, row in zip(languages, matrix, strict=True):
        cells = ["" if a == b else percent(share) for b, share in zip(languages, row, strict=True)]
        lines.append(f"| {a} | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement_matrix(evaluation: dict[str, Any]) -> list[list[float | None]]:
    """[L, L] shares of equal answers, None on the diagonal; empty where there is nothing to compare."""
    found, languages = evaluation.get("agreement"), list(evaluation["languages"])
    if not found or found["mean_pairwise"] is None:
        return []
    pairwise = found["pairwise"]
    return [[pairwise.get(a, {}).get(b, pairwise.get(b, {}).get(a)) for b in languages] for a in languages]


def output_languages_table(evaluation: dict[str, Any]) -> str:
    found = evaluation.get("output_languages")
    if not found:
        return ""
    lines = ["| asked in | answered in it % | 95 % interval | other languages |", "|---|---:|---:|---|"]
    for lang, one in found.items():
        others = ", ".join(f"{name} {number}" for name, number in one["found"].items() if name != lang)
        interval = f"{percent(one['low'])} to {percent(one['high'])}"
        lines.append(f"| {lang} | {percent(one['share'])} | {interval} | {others or '–'} |")
    return "\n".join(lines)

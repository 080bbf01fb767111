"""What an evaluation finds: figures per language, the table of them, and the versions they depend on."""

import platform
from collections.abc import Sequence
from decimal import Decimal
from importlib import metadata
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from pipeline.evaluation.answer_extraction import answers_equal
from pipeline.evaluation.dataset import Problem


class Score(NamedTuple):
    """Figures of one language; shares in [0, 1], `low` and `high` the 95 % Wilson interval of the accuracy.

    `consistency_with_pivot` is None for the pivot itself and where no problem exists in both languages.
    """

    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    consistency_with_pivot: float | None


def summarise(problems: Sequence[Problem], answers: Sequence[Decimal | None], pivot: str) -> dict[str, Any]:
    """Scores per language (keys in alphabetical order) and their macro averages, as `evaluation.json` holds them."""
    by_lang: dict[str, dict[str, tuple[Decimal | None, Decimal]]] = {}
    for problem, answer in zip(problems, answers, strict=True):
        by_lang.setdefault(problem.lang, {})[problem.pair_id] = (answer, problem.gold)
    scores = {}
    for lang, results in sorted(by_lang.items()):
        correct = sum(answers_equal(answer, gold) for answer, gold in results.values())
        shared = [] if lang == pivot else sorted(results.keys() & by_lang.get(pivot, {}).keys())
        agreeing = [answers_equal(results[pair_id][0], by_lang[pivot][pair_id][0]) for pair_id in shared]
        low, high = wilson_interval(correct, len(results))
        consistency = fmean(agreeing) if agreeing else None
        scores[lang] = Score(len(results), correct, correct / len(results), low, high, consistency)
    consistencies = [s.consistency_with_pivot for s in scores.values() if s.consistency_with_pivot is not None]
    macro = {
        "accuracy": fmean(score.accuracy for score in scores.values()),
        "consistency_with_pivot": fmean(consistencies) if consistencies else None,
    }
    return {"pivot": pivot, "languages": {lang: score._asdict() for lang, score in scores.items()}, "macro": macro}


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share `correct` of `n` > 0: honest near 0 and 1 and for few records."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_table(evaluation: dict[str, Any]) -> str:
    """The Markdown table of an evaluation (the content of `evaluation.json`), in percent."""

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.1f}"

    lines = [
        f"| language | problems | accuracy % | 95 % interval | same answer as {evaluation['pivot']} % |",
        "|---|---:|---:|---:|---:|",
    ]
    for lang, score in evaluation["languages"].items():
        interval = f"{percent(score['low'])} to {percent(score['high'])}"
        consistency = percent(score["consistency_with_pivot"])
        lines.append(f"| {lang} | {score['n']} | {percent(score['accuracy'])} | {interval} | {consistency} |")
    macro = evaluation["macro"]
    total = sum(score["n"] for score in evaluation["languages"].values())
    average, consistency = percent(macro["accuracy"]), percent(macro["consistency_with_pivot"])
    lines.append(f"| **mean of languages** | {total} | **{average}** | | **{consistency}** |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries the figures depend on, as installed here."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "deepspeed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

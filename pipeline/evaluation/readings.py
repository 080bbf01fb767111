"""Which rules read how many answers of each language, and what announced them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.evaluation.answers.language_rules import rules_for

HEADINGS = {"box": r"`\boxed{}`", "phrase": "phrase", "####": "`####`", "end": "last", "none": "none"}


def reading_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Count how the answers were read.

    Args:
        rows: rows of `generations.jsonl`.

    Returns:
        For each language: `rules`, what its rules are from ("rules of sw", "CLDR ha", "script Arab", "neutral");
        `answer_types`, the number of questions by type; `read_by`, the number of responses by what announced the answer
        (see `Reading`).
    """
    by_lang: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_lang.setdefault(row["lang"], []).append(row)
    return {
        lang: {
            "rules": rules_for(lang).name,
            "answer_types": dict(Counter(row["answer_type"] for row in group).most_common()),
            "read_by": dict(
                Counter(sample["read_by"] for row in group for sample in row.get("samples") or [row]).most_common()
            ),
        }
        for lang, group in sorted(by_lang.items())
    }


def readings_table(evaluation: dict[str, Any]) -> str:
    """Format the counts as a Markdown table. Return an empty string if there are none."""
    metrics = evaluation.get("readings")
    if not metrics:
        return ""
    lines = [
        f"| language | read by | answer types | {' | '.join(HEADINGS.values())} |",
        "|---|---|---|" + "---:|" * len(HEADINGS),
    ]
    for lang, score in metrics.items():
        types = ", ".join(f"{name} {count}" for name, count in score["answer_types"].items())
        counts = " | ".join(str(score["read_by"].get(name, 0)) for name in HEADINGS)
        lines.append(f"| {lang} | {score['rules']} | {types} | {counts} |")
    return "\n".join(lines)

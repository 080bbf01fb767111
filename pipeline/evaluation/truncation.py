"""What the token limit cut: unfinished responses, tokens per response, and tokens per character, by language."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from pipeline.evaluation.accuracy import percent

UNFINISHED_DIFFERENCE = 0.05  # languages differ much if their fractions of unfinished responses differ by more
TOKENS_RATIO = 2.0  # or if one needs so many times as many tokens per character as the median language


def truncation_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measure the length of the responses.

    Args:
        rows: rows of `generations.jsonl`.

    Returns:
        For each language: `responses`, `unfinished` (their number), `unfinished_share`; `tokens_per_response` and
        `tokens_per_character`, the means over responses and over characters, None if the tokens were not counted.
    """
    by_lang: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_lang.setdefault(row["lang"], []).extend(row.get("samples") or [row])
    metrics = {}
    for lang, samples in sorted(by_lang.items()):
        counted = [sample for sample in samples if sample.get("tokens") is not None]
        tokens = sum(sample["tokens"] for sample in counted)
        # The tokens of the reasoning are counted too.
        characters = sum(len(sample["output"]) + len(sample.get("reasoning") or "") for sample in counted)
        unfinished = sum(not sample["finished"] for sample in samples)
        metrics[lang] = {
            "responses": len(samples),
            "unfinished": unfinished,
            "unfinished_share": unfinished / len(samples),
            "tokens_per_response": tokens / len(counted) if counted else None,
            "tokens_per_character": tokens / characters if characters else None,
        }
    return metrics


def truncation_table(evaluation: dict[str, Any]) -> str:
    """Format the metrics as a Markdown table. Return an empty string if there are none."""
    metrics = evaluation.get("truncation")
    if not metrics:
        return ""
    limit = evaluation["settings"]["max_new_tokens"]
    lines = [
        "Length of the responses, and what the token limit cut:\n",
        f"| language | unfinished % | tokens per response | tokens per character | characters in {limit} tokens |",
        "|---|---:|---:|---:|---:|",
    ]
    for lang, score in metrics.items():
        rate = score["tokens_per_character"]
        tokens = [
            _number(score["tokens_per_response"], 0),
            _number(rate, 2),
            _number(limit / rate if rate else None, 0),
        ]
        lines.append(f"| {lang} | {percent(score['unfinished_share'])} | {' | '.join(tokens)} |")
    return "\n".join(lines)


def truncation_warning(evaluation: dict[str, Any]) -> str:
    """Return a line if the token limit cut some languages much more than others, or else an empty string.

    It does if the fractions of unfinished responses differ by more than 5 points. If any response is unfinished, it
    also does if a language needs more than twice as many tokens per character as the median.
    """
    metrics = evaluation["truncation"]
    shares = {lang: score["unfinished_share"] for lang, score in metrics.items()}
    if len(metrics) < 2 or not any(shares.values()):
        return ""
    most, least = max(shares, key=lambda lang: shares[lang]), min(shares, key=lambda lang: shares[lang])
    parts = []
    if shares[most] - shares[least] > UNFINISHED_DIFFERENCE:
        more, less = percent(shares[most]), percent(shares[least])
        parts.append(f"{more} % of the responses in {most} are unfinished, {less} % in {least}")
    rates = {lang: rate for lang, score in metrics.items() if (rate := score["tokens_per_character"])}
    limit = evaluation["settings"]["max_new_tokens"]
    middle = median(rates.values()) if rates else 0.0
    costly = [lang for lang, rate in rates.items() if rate > TOKENS_RATIO * middle]
    if costly:
        lengths = ", ".join(f"{limit / rates[lang]:.0f} characters in {lang}" for lang in costly)
        parts.append(f"{limit} tokens are {lengths}, and {limit / middle:.0f} in the median language")
    return f"warning: {'; '.join(parts)}; raise --max_new_tokens until no language is cut" if parts else ""


def _number(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"

"""The report on a shard directory: languages, supervised share, fill, drops."""

from pathlib import Path
from typing import Any


def report_lines(path: Path, manifest: dict[str, Any]) -> list[str]:
    """A manifest as text: a line of totals, a table of languages, a line per kind of drop."""
    totals = manifest["totals"]
    lines = [
        f"{path}: {len(manifest['shards'])} shards, {totals['rows']} rows, {totals['tokens']} tokens, "
        f"{totals['sequences']} sequences, {totals['pairs']} pairs, fill {manifest['fill']:.2%}",
        f"{'language':>10} {'sequences':>10} {'tokens':>12} {'supervised':>10} {'tokens/char':>11}",
    ]
    for lang, counts in sorted(manifest["per_language"].items()):
        if not counts:
            continue
        share, dense = counts["supervised_tokens"] / counts["tokens"], counts["tokens"] / max(counts["characters"], 1)
        lines.append(f"{lang:>10} {counts['sequences']:>10} {counts['tokens']:>12} {share:>10.1%} {dense:>11.3f}")
    for reason, found in sorted(manifest["drops"].items()):
        lines.append(f"{reason}: " + ", ".join(f"{lang} {number}" for lang, number in sorted(found.items())))
    return lines

"""Report the languages, target tokens, packing efficiency and drops of a shard directory as text or plot."""

from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError


def report_lines(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Format a manifest as text: a line of totals, a table of languages, and a line per drop reason."""
    totals = manifest["totals"]
    lines = [
        f"{path}: {len(manifest['shards'])} shards, {totals['rows']} rows, {totals['tokens']} tokens, "
        f"{totals['sequences']} sequences, {totals['pairs']} pairs, "
        f"packing efficiency {manifest['fill']:.2%}",
        f"{'language':>10} {'sequences':>10} {'tokens':>12} {'supervised':>10} {'tokens/char':>11}",
    ]
    for lang, counts in sorted(manifest["per_language"].items()):
        if not counts:
            continue
        fraction = counts["supervised_tokens"] / counts["tokens"]
        density = counts["tokens"] / max(counts["characters"], 1)
        lines.append(f"{lang:>10} {counts['sequences']:>10} {counts['tokens']:>12} {fraction:>10.1%} {density:>11.3f}")
    for reason, drops in sorted(manifest["drops"].items()):
        lines.append(f"{reason}: " + ", ".join(f"{lang} {number}" for lang, number in sorted(drops.items())))
    return lines


def plot_statistics(manifest: dict[str, Any], output: Path) -> None:
    """Plot tokens, target tokens, tokens per character and drops per language to a PNG file.

    Raises UserError if the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, only needed here

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    languages = {lang: counts for lang, counts in sorted(manifest["per_language"].items()) if counts}
    names = list(languages)
    tokens, supervised, characters = (
        [counts[key] for counts in languages.values()] for key in ("tokens", "supervised_tokens", "characters")
    )
    axes[0, 0].bar(names, tokens, color="lightgrey", label="prompt")
    axes[0, 0].bar(names, supervised, color="tab:green", label="supervised")
    axes[0, 0].set_title("tokens")
    axes[0, 0].legend()
    axes[0, 1].bar(names, [100 * part / whole for part, whole in zip(supervised, tokens, strict=True)])
    axes[0, 1].set_title("target tokens, %")
    axes[1, 0].bar(names, [number / max(length, 1) for number, length in zip(tokens, characters, strict=True)])
    axes[1, 0].set_title("tokens per character")
    bottom = dict.fromkeys(manifest["languages"], 0)
    for reason, drops in sorted(manifest["drops"].items()):
        heights = [drops.get(lang, 0) for lang in bottom]
        axes[1, 1].bar(list(bottom), heights, bottom=list(bottom.values()), label=reason)
        bottom = {lang: bottom[lang] + height for lang, height in zip(bottom, heights, strict=True)}
    axes[1, 1].set_title("drops")
    if manifest["drops"]:
        axes[1, 1].legend()
    totals = manifest["totals"]
    figure.suptitle(f"{totals['tokens']} tokens, {totals['rows']} rows, packing efficiency {manifest['fill']:.2%}")
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None

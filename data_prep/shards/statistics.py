"""The report on a shard directory: languages, supervised share, fill, drops; as text and as a plot."""

from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError


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


def plot(manifest: dict[str, Any], output: Path) -> None:
    """Draw tokens, supervised share, tokens per character and drops per language to a PNG file.

    Raises UserError where it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = {lang: found for lang, found in sorted(manifest["per_language"].items()) if found}
    names = list(counts)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    supervised = [counts[lang]["supervised_tokens"] for lang in names]
    axes[0, 0].bar(names, [counts[lang]["tokens"] for lang in names], color="lightgrey", label="prompt")
    axes[0, 0].bar(names, supervised, color="tab:green", label="supervised")
    axes[0, 0].set_title("tokens")
    axes[0, 0].legend()
    axes[0, 1].bar(names, [100 * one / counts[lang]["tokens"] for lang, one in zip(names, supervised, strict=True)])
    axes[0, 1].set_title("supervised share, %")
    axes[1, 0].bar(names, [counts[lang]["tokens"] / max(counts[lang]["characters"], 1) for lang in names])
    axes[1, 0].set_title("tokens per character")
    below = dict.fromkeys(manifest["languages"], 0)
    for reason, found in sorted(manifest["drops"].items()):
        heights = [found.get(lang, 0) for lang in below]
        axes[1, 1].bar(list(below), heights, bottom=list(below.values()), label=reason)
        below = {lang: below[lang] + height for lang, height in zip(below, heights, strict=True)}
    axes[1, 1].set_title("drops")
    if manifest["drops"]:
        axes[1, 1].legend()
    figure.suptitle(
        f"{manifest['totals']['tokens']} tokens, {manifest['totals']['rows']} rows, fill {manifest['fill']:.2%}"
    )
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)

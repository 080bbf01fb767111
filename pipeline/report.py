"""Report of a run: `report.md` and `report.png` out of its metrics, evaluation and resolved recipe.

    python -m pipeline.report --run runs/demo

Reads `metrics.jsonl` (one object per optimizer step), `evaluation.json` and `config.yaml` in that directory; what is
absent is left out of the report.
"""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data_prep.errors import UserError, exit_cleanly
from data_prep.shards import write_atomically
from pipeline.scores import accuracy_table, versions

Metrics = list[dict[str, Any]]  # one per step, in order of steps

INK, GREY = "#2b2b2b", "#9a9a9a"
BLUE, NAVY, LIGHT, ORANGE, GREEN = "#2f6db3", "#5b86b8", "#a9c5e6", "#d9822b", "#3a8f5c"
DPI = 130


def write_report(run: Path) -> None:
    """Write `report.md` and `report.png` into the run's directory.

    Raises UserError where there is nothing to report or a file is damaged.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; --run takes the output directory of a training run")
    metrics = read_metrics(run / "metrics.jsonl")
    evaluation = _read_evaluation(run / "evaluation.json")
    if not metrics and not evaluation:
        raise UserError(f"{run}: nothing to report: neither metrics.jsonl nor evaluation.json; train or evaluate first")
    picture = io.BytesIO()
    draw(metrics, evaluation).savefig(picture, format="png", dpi=DPI)
    write_atomically(run / "report.png", picture.getvalue())
    write_atomically(run / "report.md", markdown(run, metrics, evaluation).encode())
    print(f"written: {run}/report.md, {run}/report.png", flush=True)


def read_metrics(path: Path) -> Metrics:
    """The steps of a metrics file in order; of lines with the same step the last counts (a resumed run repeats some).

    Empty where the file is absent. A torn last line (the run was killed) is left out; elsewhere it is a UserError.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps: dict[int, dict[str, Any]] = {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            steps[int(values["step"])] = values
        except (ValueError, KeyError, TypeError):
            if row < len(lines):
                raise UserError(f"{path} row {row}: not a JSON object with a `step`; remove the line") from None
    return [steps[step] for step in sorted(steps)]


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        accuracy_table(evaluation)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a result of pipeline.evaluation; run that again") from None
    return evaluation


def series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, without the steps at which it is absent, null or not finite."""
    points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), int | float) and math.isfinite(m[key])]
    return [step for step, _ in points], [float(value) for _, value in points]


# --- text


def markdown(run: Path, metrics: Metrics, evaluation: dict[str, Any] | None) -> str:
    """The whole report as Markdown, the picture linked."""
    parts = [f"# Run `{run.resolve().name}`", _summary(metrics, evaluation), "![curves and accuracy](report.png)"]
    if evaluation:
        settings = evaluation.get("settings", {})
        parts += ["## Accuracy per language", accuracy_table(evaluation)]
        parts.append(
            f"Model `{settings.get('model', '?')}`, problems `{settings.get('data', '?')}`; greedy decoding, at most "
            f"{settings.get('max_new_tokens', '?')} tokens, dtype {settings.get('dtype', '?')}. Intervals are Wilson's."
        )
    if metrics:
        parts += ["## Training", _training_table(metrics)]
        if languages := _languages(metrics):
            parts += ["## Cross-entropy per language", _ce_table(metrics, languages)]
    config = run / "config.yaml"
    if config.is_file():
        parts += ["## Settings", f"```yaml\n{config.read_text(encoding='utf-8').strip()}\n```"]
    recorded = evaluation.get("versions", {}) if evaluation else {}
    listed = ", ".join(f"{name} {version}" for name, version in (recorded or versions()).items())
    return "\n\n".join([*parts, "## Versions", listed]) + "\n"


def _summary(metrics: Metrics, evaluation: dict[str, Any] | None) -> str:
    sentences = []
    if metrics:
        last = metrics[-1]
        tokens = f" on {last['num_tokens']:,} tokens" if last.get("num_tokens") else ""
        sentences.append(f"Trained for {last['step']:,} steps{tokens}.")
        kinds = (("ce_loss", "cross-entropy"), ("align_loss", "alignment loss"), ("align_cos", "alignment cosine"))
        moves = [_move(name, series(metrics, key)[1]) for key, name in kinds]
        sentences.append(f"From first to last step: {', '.join(filter(None, moves))}." if any(moves) else "")
    if evaluation:
        macro = evaluation["macro"]
        sentence = f"Mean accuracy over {len(evaluation['languages'])} languages: {100 * macro['accuracy']:.1f} %"
        if macro["consistency_with_pivot"] is not None:
            sentence += f", same answer as {evaluation['pivot']} in {100 * macro['consistency_with_pivot']:.1f} %"
        sentences.append(sentence + ".")
    return " ".join(filter(None, sentences))


def _move(name: str, values: list[float]) -> str:
    return f"{name} {values[0]:.4g} → {values[-1]:.4g}" if values else ""


def _training_table(metrics: Metrics) -> str:
    lines = ["| | first step | last step |", "|---|---:|---:|"]
    for key in ("loss", "ce_loss", "align_loss", "align_cos", "align_weight", "grad_norm", "learning_rate"):
        if values := series(metrics, key)[1]:
            lines.append(f"| {key} | {values[0]:.5g} | {values[-1]:.5g} |")
    lines += ["", "| | over the run |", "|---|---:|"]
    summaries: list[tuple[str, str, Callable[[list[float]], float], str]] = [
        ("tokens_per_second", "tokens per second, median", median, ",.0f"),
        ("mfu", "model FLOP utilisation, median", median, ".2%"),
        ("peak_memory_gb", "peak memory, GB", max, ".2f"),
        ("num_tokens", "tokens", max, ",.0f"),
    ]
    for key, name, combine, form in summaries:
        if values := series(metrics, key)[1]:
            lines.append(f"| {name} | {combine(values):{form}} |")
    return "\n".join(lines)


def _languages(metrics: Metrics) -> list[str]:
    return sorted({key.removeprefix("ce_loss_") for values in metrics for key in values if key.startswith("ce_loss_")})


def _ce_table(metrics: Metrics, languages: list[str]) -> str:
    lines = ["| language | first | last |", "|---|---:|---:|"]
    for lang in languages:
        if values := series(metrics, f"ce_loss_{lang}")[1]:
            lines.append(f"| {lang} | {values[0]:.4f} | {values[-1]:.4f} |")
    return "\n".join(lines)


# --- picture


def draw(metrics: Metrics, evaluation: dict[str, Any] | None) -> Figure:
    """Curves over steps in the upper row (those that were recorded), accuracy per language below."""
    panels = {"ce_loss": _draw_ce, "align_loss": _draw_alignment, "align_cos": _draw_cosine}
    recorded = [key for key in panels if series(metrics, key)[1]]
    rows, columns = max(1, bool(recorded) + bool(evaluation)), max(1, len(recorded))
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(max(9.2, 4.6 * columns), 3.9 * rows), layout=engine, facecolor="white")
    grid = figure.add_gridspec(rows, columns)
    for column, key in enumerate(recorded):
        panels[key](_axes(figure, grid[0, column]), metrics)
    if evaluation:
        _draw_accuracy(_axes(figure, grid[-1, :]), evaluation)
    return figure


def _axes(figure: Figure, cell: Any) -> Axes:
    axes = figure.add_subplot(cell)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving average over `window` values, over fewer at the ends."""
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _curve(axes: Axes, metrics: Metrics, key: str, color: str, label: str | None = None) -> None:
    """A quantity over steps: smoothed, over its raw values, where there are many."""
    steps, values = series(metrics, key)
    window = len(values) // 25
    if window >= 2:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, smooth(values, window), color=color, linewidth=1.9, label=label, marker=marker, zorder=3)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_ce(axes: Axes, metrics: Metrics) -> None:
    languages = [lang for lang in _languages(metrics) if series(metrics, f"ce_loss_{lang}")[1]]
    for lang in languages:
        steps, values = series(metrics, f"ce_loss_{lang}")
        axes.plot(steps, smooth(values, len(values) // 25), color=GREY, linewidth=0.8, alpha=0.7)
    if languages:
        axes.plot([], [], color=GREY, linewidth=0.8, label=f"each of {len(languages)} languages")
    _curve(axes, metrics, "ce_loss", BLUE, "all languages")
    axes.legend(frameon=False, fontsize=8.5)
    _title(axes, "Cross-entropy")


def _draw_alignment(axes: Axes, metrics: Metrics) -> None:
    _curve(axes, metrics, "align_loss", ORANGE)
    _title(axes, "Alignment loss")


def _draw_cosine(axes: Axes, metrics: Metrics) -> None:
    _curve(axes, metrics, "align_cos", GREEN)
    _title(axes, "Alignment cosine")


def _draw_accuracy(axes: Axes, evaluation: dict[str, Any]) -> None:
    pivot, scores = evaluation["pivot"], evaluation["languages"]
    order = sorted(scores, key=lambda lang: (lang != pivot, -scores[lang]["accuracy"], lang))
    heights = [scores[lang]["accuracy"] for lang in order]
    below = [max(0.0, scores[lang]["accuracy"] - scores[lang]["low"]) for lang in order]
    above = [max(0.0, scores[lang]["high"] - scores[lang]["accuracy"]) for lang in order]
    axes.bar(order, heights, color=[NAVY if lang == pivot else LIGHT for lang in order], width=0.62)
    axes.errorbar(order, heights, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=3)
    for x, lang in enumerate(order):
        top, label = scores[lang]["high"] + 0.015, f"{100 * scores[lang]['accuracy']:.1f}"
        axes.text(x, top, label, ha="center", va="bottom", fontsize=9, color=INK)
    shares = [(x + 0.2, scores[lang]["consistency_with_pivot"]) for x, lang in enumerate(order)]  # beside the interval
    agreeing = [(x, share) for x, share in shares if share is not None]
    if agreeing:
        places, agreement = zip(*agreeing, strict=True)
        diamonds = axes.scatter(places, agreement, s=45, color=ORANGE, marker="D", edgecolors="white", zorder=4)
        diamonds.set(label=f"same answer as {pivot}", clip_on=False)
    mean = evaluation["macro"]["accuracy"]
    axes.axhline(mean, color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1, label=f"mean {100 * mean:.1f} %")
    highest = max([score["high"] for score in scores.values()] + [share for _, share in agreeing])
    axes.set_ylim(0, min(1.12, max(0.1, 1.18 * highest)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(-0.6, max(len(order), 4) - 0.4)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    _title(axes, f"Accuracy per language, 95 % intervals ({pivot} is the pivot)")


def main(run: str) -> None:
    """Write report.md and report.png for a run.

    Args:
        run: directory of the run, with metrics.jsonl, evaluation.json and config.yaml.
    """
    write_report(Path(run))


if __name__ == "__main__":
    exit_cleanly(lambda: auto_cli(main, as_positional=False))

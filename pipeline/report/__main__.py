"""Write a report of one or several runs: `report.html`, `report.md` and `report.png`.

    python -m pipeline.report --run runs/demo/solar-seed42
    python -m pipeline.report --run runs/sft runs/solar --output runs/report

The report is built from `metrics.jsonl`, `evaluation.json`, `generations.jsonl`, `representations.json` and
`config.yaml` in the output directory of each run. Sections without data are omitted. The first of several runs is the
baseline that the others are compared with.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.plotting import png
from pipeline.compare import MEAN, compare_runs, primary_sentence
from pipeline.evaluation.accuracy import unfinished_sentence
from pipeline.report.plots import plot_overview, run_color
from pipeline.report.render import to_html, to_markdown
from pipeline.report.runs import RunResults, read_runs, series
from pipeline.report.sections import build_sections
from pipeline.report.similarity_table import in_words, soft_token_differences


def write_report(paths: Sequence[Path], output: Path | None = None, primary: Sequence[str] = (MEAN,)) -> None:
    """Write the three files of a report.

    Args:
        paths: output directories of the runs, the baseline first.
        output: directory for the report; default: the run directory; required for several runs.
        primary: the primary measure of several runs; see `compare_runs`.

    Raises:
        UserError: there is nothing to report, a file is damaged, `output` is missing for several runs, the runs were
            evaluated on different data, or there is a primary measure and nothing to compare.
    """
    if output is None:
        if len(paths) > 1:
            raise UserError("--output is missing; it is required for several runs")
        output = paths[0]
    runs = read_runs(list(paths))
    heading = f"Run `{runs[0].name}`" if len(runs) == 1 else " and ".join(run.name for run in runs)
    comparisons = compare_with_first(runs, primary)
    if list(primary) != [MEAN] and not comparisons:
        raise UserError("--primary: there is nothing to compare; give --run two evaluated runs, the baseline first")
    summary, sections = summarize_runs(runs, comparisons), build_sections(runs, comparisons)
    colors = {run.name: run_color(runs, run) for run in runs} if len(runs) > 1 else {}
    page, text = to_html(heading.replace("`", ""), summary, sections, colors), to_markdown(heading, summary, sections)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "report.png", png(plot_overview(runs, primary)))
        write_atomically(output / "report.html", page.encode())
        write_atomically(output / "report.md", text.encode())
    except OSError as error:
        raise UserError(f"{output}: cannot write the report ({error.strerror}); give another --output") from None
    print(f"written: {output}/report.html, report.md, report.png", flush=True)


def compare_with_first(runs: Sequence[RunResults], primary: Sequence[str] = (MEAN,)) -> dict[str, dict[str, Any]]:
    """Compare all runs with generations with the first run. Return {} if the first run has no generations."""
    evaluated = [run for run in runs if (run.path / "generations.jsonl").is_file()]
    if not evaluated or evaluated[0] is not runs[0]:
        return {}
    return {run.name: compare_runs(runs[0].path, run.path, primary) for run in evaluated[1:]}


def summarize_runs(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> str:
    """Summarize a single run in a few sentences, or name the baseline of several runs and state the differences."""
    if len(runs) > 1:
        return _summarize_comparisons(runs, comparisons)
    (run,) = runs
    sentences = []
    if run.metrics:
        last = run.metrics[-1]
        tokens = f" on {last['num_tokens']:,} tokens" if last.get("num_tokens") else ""
        sentences.append(f"Trained for {last['step']:,} steps{tokens}.")
        names = (("ce_loss", "cross-entropy"), ("align_loss", "alignment loss"), ("align_cos", "alignment cosine"))
        changes = [_change(name, series(run.metrics, key)[1]) for key, name in names]
        if any(changes):
            sentences.append(f"From the first to the last step: {', '.join(filter(None, changes))}.")
    if run.evaluation:
        macro = run.evaluation["macro"]
        sentences.append(unfinished_sentence(run.evaluation))
        model = "" if run.evaluated_step is None else f" of the model at step {run.evaluated_step:,}"
        languages = len(run.evaluation["languages"])
        sentence = f"Mean accuracy{model} over {languages} languages: {100 * macro['accuracy']:.1f} %"
        if macro["consistency_with_pivot"] is not None:
            sentence += f", same answer as {run.evaluation['pivot']}: {100 * macro['consistency_with_pivot']:.1f} %"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _summarize_comparisons(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> str:
    baseline = runs[0]
    sentences = [f"Comparison of {len(runs)} runs; {baseline.name} is the baseline."]
    if comparisons:
        largest = max(comparisons.values(), key=lambda result: int(result["records"]))
        size = f"{largest['problems']} problems in {len(largest['languages'])} languages"
        sentences = [f"Comparison of {len(runs)} runs on {size}; {baseline.name} is the baseline."]
    for run in runs[1:]:
        if run.name in comparisons:
            sentences.append(f"{run.name}: {primary_sentence(comparisons[run.name])}")
            sentences += _left_out(comparisons[run.name])
        if difference := soft_token_differences(baseline, run).get("centred_cosine"):
            sentences.append(f"{run.name}: centered cosine of translations, soft tokens, {in_words(difference)}.")
    return " ".join(sentences)


def _left_out(comparison: dict[str, Any]) -> list[str]:
    """Return a sentence on the records that a comparison leaves out, if there are any."""
    if not comparison["left_out"]:
        return []
    return [
        f"{comparison['left_out']} records that one of the two lacks were left out: the differences are those of the "
        f"other {comparison['records']}, in {len(comparison['languages'])} languages."
    ]


def _change(name: str, values: list[float]) -> str:
    return f"{name} {values[0]:.4g} → {values[-1]:.4g}" if values else ""


def main() -> None:
    """Run the command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=about)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="output directories, the baseline first")
    parser.add_argument(
        "--output", type=Path, help="directory for the report; default: the run directory; required for several runs"
    )
    about = "primary measure of several runs, named beforehand: mean (default), or languages to average"
    parser.add_argument("--primary", nargs="+", default=[MEAN], help=about)
    args = parser.parse_args()
    write_report(args.run, args.output, args.primary)


if __name__ == "__main__":
    exit_cleanly(main)

"""Report of a run, or of several side by side: `report.html`, one page with all pictures, `report.md` and `report.png`.

    python -m pipeline.report --run runs/demo
    python -m pipeline.report --run runs/sft runs/solar --output runs/report

Reads `metrics.jsonl`, `evaluation.json`, `generations.jsonl`, `representations.json` and `config.yaml` in each run's
directory; what is absent is left out. Of several runs the first is the baseline, against which the others are tested.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.plotting import png
from pipeline.compare import compare_runs
from pipeline.report.plots import arm_color, overview
from pipeline.report.render import to_html, to_markdown
from pipeline.report.runs import Run, read_runs, series
from pipeline.report.sections import sections


def write_report(paths: Sequence[Path], output: Path | None = None) -> None:
    """Write the three files into `output`, by default the directory of the one run.

    Raises UserError where there is nothing to report, a file is damaged or runs were evaluated on different data.
    """
    if output is None:
        if len(paths) > 1:
            raise UserError("several runs: say with --output where their report goes")
        output = paths[0]
    runs = read_runs(list(paths))
    heading = f"Run `{runs[0].name}`" if len(runs) == 1 else " and ".join(run.name for run in runs)
    said, found = summary(runs), sections(runs, compare_with_first(runs))
    colors = {run.name: arm_color(runs, run) for run in runs} if len(runs) > 1 else {}
    page, text = to_html(heading.replace("`", ""), said, found, colors), to_markdown(heading, said, found)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "report.png", png(overview(runs)))
        write_atomically(output / "report.html", page.encode())
        write_atomically(output / "report.md", text.encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error.strerror}); give another --output") from None
    print(f"written: {output}/report.html, report.md, report.png", flush=True)


def compare_with_first(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By run, its comparison with the first; of those that have generations."""
    having = [run for run in runs if (run.path / "generations.jsonl").is_file()]
    if not having or having[0] is not runs[0]:
        return {}
    return {run.name: compare_runs(runs[0].path, run.path) for run in having[1:]}


def summary(runs: Sequence[Run]) -> str:
    """A few sentences on one run; one on several."""
    if len(runs) > 1:
        return f"{len(runs)} runs side by side; {runs[0].name} is the baseline."
    (run,) = runs
    sentences = []
    if run.metrics:
        last = run.metrics[-1]
        tokens = f" on {last['num_tokens']:,} tokens" if last.get("num_tokens") else ""
        sentences.append(f"Trained for {last['step']:,} steps{tokens}.")
        kinds = (("ce_loss", "cross-entropy"), ("align_loss", "alignment loss"), ("align_cos", "alignment cosine"))
        moves = [_move(name, series(run.metrics, key)[1]) for key, name in kinds]
        if any(moves):
            sentences.append(f"From first to last step: {', '.join(filter(None, moves))}.")
    if run.evaluation:
        macro = run.evaluation["macro"]
        sentence = f"Mean accuracy over {len(run.evaluation['languages'])} languages: {100 * macro['accuracy']:.1f} %"
        if macro["consistency_with_pivot"] is not None:
            share = 100 * macro["consistency_with_pivot"]
            sentence += f", same answer as {run.evaluation['pivot']} in {share:.1f} %"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _move(name: str, values: list[float]) -> str:
    return f"{name} {values[0]:.4g} → {values[-1]:.4g}" if values else ""


def main() -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=about)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="directories of runs, the baseline first")
    parser.add_argument("--output", type=Path, help="where the files go; the run's directory if there is one run")
    args = parser.parse_args()
    write_report(args.run, args.output)


if __name__ == "__main__":
    exit_cleanly(main)

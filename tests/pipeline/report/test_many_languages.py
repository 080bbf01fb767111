"""Test that the results of thirty languages with answers of every type remain readable."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pipeline.common.plotting import new_figure
from pipeline.compare import compare_runs
from pipeline.report.__main__ import write_report
from pipeline.report.plots import plot_agreement, plot_overview
from pipeline.report.runs import read_runs
from pipeline.representations.plots import draw_legend
from tests.pipeline.report.planted_languages import SENTENCES, write_evaluation, write_test_file

PRIMARY = ["sw", "ha", "am"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    data = root / "test.jsonl"
    write_test_file(data)
    return [write_evaluation(root / "sft", data, 0.3, 1), write_evaluation(root / "solar", data, 0.6, 2)]


def test_report_begins_with_main_table(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path, PRIMARY)
    text = (tmp_path / "report.md").read_text()
    lines = [line for line in text.partition("## Accuracy per language")[2].partition("##")[0].splitlines() if line]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][:34]
    assert lines[0].startswith("| language | n | sft | solar | solar − sft | Holm p | unfinished %")
    names = [row[0] for row in rows[2:]]
    assert names[:2] == ["mean of languages", "mean of sw, ha, am (primary)"]
    assert set(names[2:5]) == set(PRIMARY) and names[5] == "en" and set(names[2:]) == set(SENTENCES)
    accuracies = [float(row[2].split()[0]) for row in rows[8:]]
    assert accuracies == sorted(accuracies, reverse=True)
    result = compare_runs(*runs, PRIMARY)
    for row, entry in [(rows[2], result["mean"]), (rows[3], result["primary"]), *((row, None) for row in rows[4:])]:
        shown = entry or result["languages"][row[0]]
        values = [100 * shown[key] for key in ("baseline", "candidate", "difference", "low", "high")]
        assert [row[2].split()[0], row[3].split()[0]] == [f"{value:.1f}" for value in values[:2]]
        assert row[4] == "{:+.1f} ({:+.1f} to {:+.1f})".format(*values[2:])
        assert row[5] == (f"p = {shown['p']:.3g}" if entry else f"{shown['p_holm']:.3g}")
    evaluation = read_runs(runs)[1].evaluation or {}
    ha = next(row for row in rows if row[0] == "ha")
    assert ha[6].endswith(f", {100 * evaluation['languages']['ha']['unfinished'] / 12:.1f}")
    assert ha[7] == "100.0 †, 100.0 †"  # Hausa is written like English, and lingua lacks it


def test_evaluation_tables_are_narrow_and_have_captions(runs: list[Path]) -> None:
    parts = (runs[0] / "evaluation.md").read_text().split("\n\n")
    tables = [i for i, part in enumerate(parts) if part.startswith("|")]
    assert len(tables) == 5 and all(not parts[i - 1].startswith("|") for i in tables)
    for i in tables:
        assert max(line.count("|") for line in parts[i].splitlines()) <= 11
        assert all(f"\n| {lang} |" in parts[i] for lang in SENTENCES)


def test_plot_labels_do_not_overlap(runs: list[Path]) -> None:
    results = read_runs(runs)
    for figure in (plot_overview(results), plot_agreement(results)):
        assert figure is not None
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            _check_labels(axes)
            assert len(axes.texts) < 100  # no numbers in small cells


def _check_labels(axes: Axes) -> None:
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert not any(first.overlaps(second) for first, second in pairwise(boxes))


def test_legend_of_many_languages_fits_figure() -> None:
    figure = new_figure(8.6, 8.4)
    draw_legend(figure, {"languages": [f"{lang}_Latn" for lang in SENTENCES]})
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    styles = {(handle.get_color(), handle.get_marker()) for handle in figure.legends[0].legend_handles}
    assert len(styles) == len(SENTENCES)

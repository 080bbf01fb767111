"""Test reports: their content, the metrics of resumed runs, and plots for every mix of inputs."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from pipeline.common.errors import UserError
from pipeline.evaluation.accuracy import accuracy_table
from pipeline.fault_tolerance.restarts import RestartLog
from pipeline.report.__main__ import compare_with_first, write_report
from pipeline.report.blocks import MarkdownBlock, Section
from pipeline.report.plots import plot_overview, smooth
from pipeline.report.render import to_html, to_markdown
from pipeline.report.runs import RunResults, read_run, series
from pipeline.report.sections import build_sections
from pipeline.status import status
from pipeline.training.metrics_reader import read_metrics


def step(number, **values):
    base = {
        "step": number,
        "loss": 3.0,
        "ce_loss": 2.0,
        "align_loss": 1.0,
        "align_cos": 0.5,
        "num_tokens": 100 * number,
    }
    return {**base, "tokens_per_second": 10.0 * number, "mfu": None, "ce_loss_en": 1.5, **values}


def score(accuracy, consistency):
    low, high = max(0, accuracy - 0.1), min(1, accuracy + 0.1)
    return {
        "n": 20,
        "unfinished": 5,
        "correct": round(20 * accuracy),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "consistency_with_pivot": consistency,
    }


EVALUATION = {
    "settings": {"model": "hf", "data": "test.jsonl", "max_new_tokens": 64, "dtype": "auto"},
    "model": {"dtype": "bfloat16", "export": {"step": 2}},
    "versions": {"torch": "9.9.9"},
    "pivot": "en",
    "languages": {"en": score(0.9, None), "sw": score(0.25, 0.3)},
    "macro": {"accuracy": 0.575, "consistency_with_pivot": 0.3},
}


def write_metrics(run, steps):
    (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))


def test_metrics_keep_last_line_of_a_step(tmp_path):
    write_metrics(tmp_path, [step(1), step(2, loss=9.0), step(3, loss=9.0), step(2, loss=5.0), step(3, loss=4.0)])
    assert series(read_metrics(tmp_path), "loss") == ([1, 2, 3], [3.0, 5.0, 4.0])


def test_metrics_skip_torn_last_line_and_refuse_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step(1)) + '\n{"step": 2, "lo')
    assert [m["step"] for m in read_metrics(tmp_path)] == [1]
    path.write_text('{"step": 2, "lo\n' + json.dumps(step(1)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl row 1"):
        read_metrics(tmp_path)


def test_series_skips_null_absent_and_nan():
    metrics = [
        {"step": 1, "x": 1},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 4, "x": float("nan")},
        {"step": 5, "x": 2},
    ]
    assert series(metrics, "x") == ([1, 5], [1.0, 2.0])


def test_report_and_status_show_validations(tmp_path):
    """The validation of a step does not replace its training record, and is drawn beside the training curve."""
    metrics = [step(i, grad_norm=1.0, step_seconds=1.0) for i in (1, 2, 3)]
    values = {"eval_loss": 4.5, "eval_alignment": None, "eval_align_cos": None, "eval_seconds": 1.0}
    validations = [
        {"step": 2, "eval_ce": 3.5, **values, "best_metric": 3.5, "best_step": 2},
        {"step": 3, "eval_ce": 4.25, **values, "best_metric": 3.5, "best_step": 2},
    ]
    write_metrics(tmp_path, [*metrics[:2], validations[0], metrics[2], validations[1]])
    assert read_metrics(tmp_path) == metrics
    run = read_run(tmp_path, "run")
    assert run.validations == validations
    text = to_markdown("title", "", build_sections([run], {}))
    for row in (
        "| eval_ce | 3.5 → 4.25 |",
        "| eval_alignment | – |",
        "| best | 3.5 at step 2 |",
        "| ce_loss | 2 → 2 |",
    ):
        assert row in text, text
    axes = plot_overview([run]).axes
    (curve,) = [line for line in axes[0].lines if line.get_label() == "all languages, validation"]
    assert curve.get_xydata().tolist() == [[2, 3.5], [3, 4.25]] and axes[0].get_legend()
    RestartLog(tmp_path, 0.0).record_start(0, 9, 2)
    lines = status(tmp_path)
    assert "validation   step 3: eval_loss 4.5, eval_ce 4.25; best 3.5 at step 2" in lines


def test_smooth_averages_centered_window():
    assert smooth([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert smooth([1.0, 2.0], 0) == [1.0, 2.0]


def test_report_of_single_run_has_its_results(tmp_path):
    write_metrics(tmp_path, [step(1), step(2, ce_loss=1.25, align_cos=0.75), step(3, ce_loss=1.0, align_cos=0.875)])
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "config.yaml").write_text("loss:\n  alignment_weight: 0.125\n")
    write_report([tmp_path])
    text = (tmp_path / "report.md").read_text()
    for expected in [
        "Trained for 3 steps on 300 tokens.",
        "cross-entropy 2 → 1",
        "alignment cosine 0.5 → 0.875",
        "10 of 40 responses are unfinished, cut at 64 tokens: en 5, sw 5.",
        "Mean accuracy of the model at step 2 over 2 languages: 57.5 %, same answer as en: 30.0 %.",
        "| sw | 20 | 5 | 25.0 | 15.0 to 35.0 | 30.0 |",
        "| ce_loss | 2 → 1 |",
        "| tokens per second, median | 20 |",
        "| en | 1.5000 → 1.5000 |",
        "alignment_weight: 0.125",
        "torch 9.9.9",
        "](report.png)",
    ]:
        assert expected in text
    assert "FLOP" not in text and "None" not in text and "nan" not in text
    assert accuracy_table(EVALUATION) in text
    image = imread(tmp_path / "report.png")
    assert image.shape[0] > 800 and image.shape[1] > 1200
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "evaluation.json",
        "config.yaml",
        "report.html",
        "report.md",
        "report.png",
    }


def test_report_lists_settings_changed_on_resume(tmp_path):
    write_metrics(tmp_path, [step(1)])
    log = RestartLog(tmp_path, 0.0)
    log.record_start(0, 9, 2)
    for _ in range(2):  # the second start ended before it had saved
        log.record_start(4, 9, 2, changed={"training.learning_rate": [0.003, 0.001]})
    text = to_markdown("title", "", build_sections([read_run(tmp_path, "run")], {}))
    assert text.count("| training.learning_rate | 4 | 0.003 | 0.001 |") == 1, text


def run_of(steps, evaluation, name="run", path=Path("nowhere")):
    return RunResults(name, path, steps, evaluation, None, None)


PLAIN_SFT = {"align_loss": None, "align_cos": None}


@pytest.mark.parametrize(
    ("steps", "evaluation", "titles"),
    [
        ([step(1)], EVALUATION, ["Cross-entropy", "Alignment loss", "Alignment cosine", "Accuracy per language"]),
        ([step(i) for i in range(200)], None, ["Cross-entropy", "Alignment loss", "Alignment cosine"]),
        ([step(i, **PLAIN_SFT) for i in range(9)], EVALUATION, ["Cross-entropy", "Accuracy per language"]),
        ([step(i, **PLAIN_SFT) for i in range(9)], None, ["Cross-entropy"]),
        ([], EVALUATION, ["Accuracy per language"]),
    ],
)
def test_plot_overview_has_panel_for_each_input(tmp_path, steps, evaluation, titles):
    run = run_of(steps, evaluation)
    figure = plot_overview([run])
    drawn = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(drawn) == len(titles)
    assert all(title.startswith(expected) for title, expected in zip(drawn, titles, strict=True))
    figure.savefig(tmp_path / "x.png")
    assert to_markdown("x", "", build_sections([run], {})) and to_html("x", "", build_sections([run], {}), {})


@pytest.mark.parametrize("agreement", [0.7, 1.0])
def test_plot_overview_keeps_agreement_within_its_panel(agreement):
    """The markers stay within their panel if the accuracy is low and the agreement high."""
    evaluation = {**EVALUATION, "languages": {"en": score(0.05, None), "sw": score(0.05, agreement)}}
    axes = plot_overview([run_of([step(1)], evaluation)]).axes[-1]
    (markers,) = [drawn for drawn in axes.collections if drawn.get_label() == "same answer as en"]
    bottom, top = axes.get_ylim()
    assert bottom <= 0 and agreement < top <= 1.12
    assert all(bottom <= y < top for _, y in markers.get_offsets())


def test_report_refuses_run_without_results(tmp_path):
    for run, message in [(tmp_path / "none", "no such directory"), (tmp_path, "nothing to report")]:
        with pytest.raises(UserError, match=message) as caught:
            write_report([run])
        assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing to report"):
        write_report([tmp_path])
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"pivot": "en", "languages": {"en": {}}}'])
def test_report_refuses_damaged_evaluation(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json: not a result of pipeline\.evaluation"):
        write_report([tmp_path])


def test_report_refuses_damaged_recipe(tmp_path):
    runs = [tmp_path / name for name in ("sft", "solar")]
    for run in runs:
        run.mkdir()
        write_metrics(run, [step(1)])
        (run / "config.yaml").write_text("seed: [1\n" if run.name == "solar" else "seed: 1\n")
    with pytest.raises(UserError, match=r"solar/config\.yaml: not YAML; restore it"):
        write_report(runs, tmp_path / "report")


def test_report_refuses_damaged_representations(tmp_path):
    (tmp_path / "representations.json").write_text('{"representations": {"final": {}}}')
    with pytest.raises(UserError, match=r"representations\.json: not a result of pipeline\.representations"):
        write_report([tmp_path])


def test_report_html_escapes_text_from_runs():
    """Names, settings and recipes cannot add scripts, images or links to the page."""
    evaluation = {
        **EVALUATION,
        "settings": {"model": "<img src=x>", "data": "![x](http://y)", "max_new_tokens": 8},
        "versions": {"a": "![b](c)"},
    }
    run = RunResults("<script>a", Path("x"), [step(1), step(2)], evaluation, None, "key: <img src=x onerror=y> | `z`")
    page = to_html("<b>", "<i>", build_sections([run, run_of([step(1)], None)], {}), {})
    assert "<script" not in page and "<img src=x" not in page and "<b>" not in page
    assert "&lt;script&gt;a" in page and "&lt;img src=x onerror=y&gt; | `z`" in page
    assert "a ![b](c)" in page and 'href="http' not in page and 'src="http' not in page


def test_report_html_renders_markdown_tables():
    sections = [Section("x", [MarkdownBlock("**sft** at `p`\n\n| a | b |\n|---|---:|\n| c | 1 |")])]
    page = to_html("x", "", sections, {})
    assert "<strong>sft</strong> at <code>p</code>" in page
    assert '<th scope="row">c</th>\n<td style="text-align:right">1</td>' in page


def test_report_of_several_runs_needs_output(tmp_path):
    with pytest.raises(UserError, match="--output is missing"):
        write_report([tmp_path, tmp_path])


def test_report_primary_measure_needs_runs_to_compare(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n")
    with pytest.raises(UserError, match="--primary: there is nothing to compare"):
        write_report([tmp_path], primary=["sw"])
    assert not (tmp_path / "report.html").exists()


def test_compare_with_first_skips_runs_without_generations():
    assert compare_with_first([run_of([step(1)], None), run_of([step(1)], None)]) == {}

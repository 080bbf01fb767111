"""Content of a report: sections of paragraphs, tables, plots and code, independent of the output format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from matplotlib.figure import Figure

from pipeline.compare import unfinished_totals
from pipeline.evaluation.accuracy import accuracy_table, count_unfinished, unfinished_sentence
from pipeline.evaluation.consistency import agreement_sentences, agreement_table, output_languages_table, percent
from pipeline.evaluation.details import detail_tables
from pipeline.report import plots
from pipeline.report.overview_table import ABSENT, overview_rows
from pipeline.report.runs import MetricHistory, RunResults, languages_of, series
from pipeline.representations.plots import label
from pipeline.representations.tables import POSITIONS, with_interval


@dataclass(frozen=True)
class ReportTable:
    """Table of text cells.

    Attributes:
        header: cells of the header row.
        rows: cells of the other rows. The first cell is the row heading.
        text_cells: whether the other cells are left-aligned text instead of numbers.
        tiles: whether HTML shows each row of two cells as a tile.
    """

    kind: ClassVar = "table"
    header: list[str]
    rows: list[list[str]]
    text_cells: bool = False
    tiles: bool = False


@dataclass(frozen=True)
class PlotBlock:
    """Plot with its alt text. Only shown in HTML."""

    kind: ClassVar = "plot"
    figure: Figure
    alt_text: str


@dataclass(frozen=True)
class CodeBlock:
    """Preformatted text. HTML folds it under its heading."""

    kind: ClassVar = "code"
    heading: str
    text: str


@dataclass(frozen=True)
class MarkdownBlock:
    """Paragraphs and tables in Markdown. HTML folds them under `summary` if it is not empty."""

    kind: ClassVar = "markdown"
    text: str
    summary: str = ""


ReportBlock = ReportTable | PlotBlock | CodeBlock | MarkdownBlock


@dataclass(frozen=True)
class Section:
    """Heading and content of a section."""

    heading: str
    blocks: list[ReportBlock]


def build_sections(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> list[Section]:
    """Build the sections of a report. Sections without content are omitted.

    Args:
        runs: results of the runs; the first one is the baseline.
        comparisons: comparison of each run with the baseline (`pipeline.compare`), by run name.
    """
    built = [
        _overview(runs),
        _accuracy(runs),
        _differences(runs, comparisons),
        _consistency(runs),
        _representations(runs),
        _training(runs),
        _settings(runs),
        _versions(runs),
    ]
    return [section for section in built if section.blocks]


def _overview(runs: Sequence[RunResults]) -> Section:
    table = ReportTable(["", *(run.name for run in runs)], overview_rows(runs), tiles=len(runs) == 1)
    return Section("Overview", [table] if table.rows else [])


def _accuracy(runs: Sequence[RunResults]) -> Section:
    evaluated = [run for run in runs if run.evaluation]
    blocks: list[ReportBlock] = []
    for run in evaluated:
        prefix = f"{run.name}: " if len(evaluated) > 1 else ""
        blocks.append(MarkdownBlock(prefix + unfinished_sentence(run.evaluation or {})))
    if figure := plots.plot_accuracy(runs):
        alt_text = "Bar chart of the accuracy per language with 95 % intervals; the table has the values."
        blocks.append(PlotBlock(figure, alt_text))
    if len(evaluated) == 1 and evaluated[0].evaluation:
        blocks.append(MarkdownBlock(accuracy_table(evaluated[0].evaluation)))
    elif evaluated:
        blocks.append(_accuracy_of_runs(evaluated))
    blocks += [MarkdownBlock(_evaluated_model(run)) for run in evaluated]
    for run in evaluated:
        title = "what the token limit cut, and how answers were read" + (f": {run.name}" if len(evaluated) > 1 else "")
        if tables := detail_tables(run.evaluation or {}):
            blocks.append(MarkdownBlock(tables, summary=title))
    return Section("Accuracy per language", blocks)


def _evaluated_model(run: RunResults) -> str:
    """Describe the model, the data and the settings of an evaluation."""
    evaluation = run.evaluation or {}
    settings, model = evaluation["settings"], evaluation["model"]
    step = f" (step {run.evaluated_step:,})" if run.evaluated_step is not None else ""
    variables = settings.get("chat_template_kwargs")
    decoding = "greedy decoding"
    if temperature := settings.get("temperature"):
        decoding = f"{settings['num_samples']} samples at temperature {temperature:g}, top_p {settings['top_p']:g}"
    return (
        f"{run.name}: model `{settings['model']}`{step}, data `{settings['data']}`, {decoding} of at most "
        f"{settings['max_new_tokens']} tokens in {model['dtype']}"
        + (f", chat template with `{json.dumps(variables)}`" if variables else "")
        + ". The intervals are Wilson score intervals."
    )


def _accuracy_of_runs(runs: Sequence[RunResults]) -> ReportTable:
    order, _ = plots.ordered_languages(runs)
    rows = []
    for lang in order:
        scores = [(run.evaluation or {})["languages"].get(lang) for run in runs]
        cells = [
            f"{percent(score['accuracy'])} ({percent(score['low'])} to {percent(score['high'])})" if score else ABSENT
            for score in scores
        ]
        rows.append([lang, *cells])
    unfinished = [f"{cut} of {n}" for cut, n in (count_unfinished(run.evaluation or {}) for run in runs)]
    means = [percent((run.evaluation or {})["macro"]["accuracy"]) for run in runs]
    rows = [["unfinished responses", *unfinished], *rows, ["mean of languages", *means]]
    return ReportTable(["accuracy %", *(run.name for run in runs)], rows)


def _differences(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> Section:
    if not comparisons:
        return Section("", [])
    explanation = (
        f"Each run is compared with {runs[0].name} on the same problems. The intervals come from a paired bootstrap "
        "over problems. Gained and lost problems are those that only the run or only the baseline solves; p is the "
        "p-value of McNemar's exact test on these two counts, and Holm p is adjusted for the number of languages. "
        "Unfinished responses (baseline, run) were cut at the token limit."
    )
    alt_text = "Differences in accuracy with 95 % intervals; the table has the values."
    figure = plots.plot_differences(runs, comparisons)
    blocks: list[ReportBlock] = [MarkdownBlock(explanation), PlotBlock(figure, alt_text)]
    header = ["", "unfinished", "difference, points", "95 % interval", "gained, lost", "p", "Holm p"]
    for name, comparison in comparisons.items():
        cut = ", ".join(map(str, unfinished_totals(comparison)))
        p = f"{comparison['mean']['p']:.3g}"
        rows = [[f"{name}: mean of languages", cut, *_difference_cells(comparison["mean"]), "", p, ""]]
        for lang, entry in comparison["languages"].items():
            cut = ", ".join(map(str, comparison["unfinished"][lang]))
            counts = f"{entry['gained']}, {entry['lost']}" if "gained" in entry else ABSENT
            tests = [f"{entry[key]:.3g}" for key in ("p", "p_holm")]
            rows.append([lang, cut, *_difference_cells(entry), counts, *tests])
        blocks.append(ReportTable(header, rows))
    return Section(f"Differences from {runs[0].name}", blocks)


def _difference_cells(entry: dict[str, float]) -> list[str]:
    return [f"{100 * entry['difference']:+.1f}", f"{100 * entry['low']:+.1f} to {100 * entry['high']:+.1f}"]


def _consistency(runs: Sequence[RunResults]) -> Section:
    blocks: list[ReportBlock] = []
    if figure := plots.plot_agreement(runs):
        alt_text = "Heat maps of the fraction of problems to which two languages give the same answer."
        blocks.append(PlotBlock(figure, alt_text))
    for run in runs:
        if not run.evaluation:
            continue
        texts = [agreement_sentences(run.evaluation), output_languages_table(run.evaluation)]
        if text := "\n\n".join(filter(None, texts)):
            blocks.append(MarkdownBlock(f"**{run.name}**\n\n{text}" if len(runs) > 1 else text))
        if matrix := agreement_table(run.evaluation):
            blocks.append(MarkdownBlock(matrix, summary="same answers, as a table"))
    return Section("Agreement across languages, languages of the outputs", blocks)


def _representations(runs: Sequence[RunResults]) -> Section:
    figure, by_layer = plots.plot_states(runs), plots.plot_layers(runs)
    if not figure or not by_layer:
        return Section("", [])
    measured = [(run.name, run.representations) for run in runs if run.representations]
    _, first = measured[0]
    explanation = (
        f"{first['problems']} problems in {len(first['languages'])} languages; states at "
        f"{POSITIONS[first['position']]}. Dotted lines and numbers in parentheses show the value for shuffled pairs, "
        "brackets 95 % intervals over problems. z: states standardized by dimension."
    )
    blocks: list[ReportBlock] = [
        PlotBlock(figure, "First two principal components of the final state and of the soft-token representation."),
        PlotBlock(by_layer, "Centered cosine, retrieval and silhouette by layer, with values for shuffled pairs."),
        MarkdownBlock(explanation),
    ]
    metrics = ["P@1", "debiased CKA", "centered cosine", "cosine", "z cosine", "variance by language", "by example"]
    metrics += ["silhouette", "k-means NMI", "probe"]
    rows = []
    for name, result in measured:
        for state in ("final", "soft_tokens"):
            values = result["representations"][state]
            similarity, zscored = values["similarity"]["all"], values["similarity_zscored"]["all"]
            cells = [with_interval(similarity[metric]) for metric in ("retrieval", "debiased_cka", "centred_cosine")]
            cells += [
                f"{pair['value']:.3f} ({pair['floor']:.3f})" for pair in (similarity["cosine"], zscored["cosine"])
            ]
            cells += [with_interval(values["variance"][part]) for part in ("language", "example")]
            cells += [f"{values['separability'][metric]:.3f}" for metric in ("silhouette", "kmeans_nmi", "probe")]
            rows.append([f"{name}: {label(state)}", *cells])
    return Section("Representations", [*blocks, ReportTable(["", *metrics], rows)])


def _training(runs: Sequence[RunResults]) -> Section:
    trained = [run for run in runs if run.metrics]
    blocks: list[ReportBlock] = []
    if figure := plots.plot_curves(runs):
        blocks.append(PlotBlock(figure, "Losses and alignment cosine by step."))
    keys = ["loss", "ce_loss", "align_loss", "align_cos", "align_weight", "grad_norm", "learning_rate"]
    keys = [key for key in keys if any(series(run.metrics, key)[1] for run in trained)]
    histories = [run.metrics for run in trained]
    if rows := [[key, *_first_to_last(histories, key, ".5g")] for key in keys]:
        blocks.append(ReportTable(["first → last step", *(run.name for run in trained)], rows))
    languages = sorted({lang for run in trained for lang in languages_of(run.metrics)})
    if rows := [[lang, *_first_to_last(histories, f"ce_loss_{lang}", ".4f")] for lang in languages]:
        blocks.append(ReportTable(["cross-entropy by language", *(run.name for run in trained)], rows))
    validated = [run for run in runs if run.validations]
    last = [run.validations[-1] for run in validated]
    keys = sorted({key for record in last for key in record if key.startswith("eval_")} - {"eval_seconds"})
    rows = [[key, *_first_to_last([run.validations for run in validated], key, ".5g")] for key in keys]
    if any(record.get("best_step") for record in last):
        best = [f"{v['best_metric']:.5g} at step {v['best_step']}" if v.get("best_step") else ABSENT for v in last]
        rows.append(["best", *best])
    if rows:
        blocks.append(ReportTable(["validation, first → last", *(run.name for run in validated)], rows))
    return Section("Training", blocks)


def _first_to_last(histories: Sequence[MetricHistory], key: str, format_spec: str) -> list[str]:
    """Return a cell for each run with the first and last value of a metric."""
    values = [series(history, key)[1] for history in histories]
    return [f"{v[0]:{format_spec}} → {v[-1]:{format_spec}}" if v else ABSENT for v in values]


def _settings(runs: Sequence[RunResults]) -> Section:
    """Build the section with the keys that differ between the recipes or were changed, and each full recipe."""
    blocks: list[ReportBlock] = []
    with_recipe = [run for run in runs if run.config]
    if len(with_recipe) > 1:
        recipes = [run.settings for run in with_recipe]
        keys = sorted({key for recipe in recipes for key in recipe} - {"output_dir"})
        rows = [
            [key, *(str(recipe.get(key, ABSENT)) for recipe in recipes)]
            for key in keys
            if len({repr(recipe.get(key, ABSENT)) for recipe in recipes}) > 1
        ]
        if rows:
            blocks.append(ReportTable(["setting", *(run.name for run in with_recipe)], rows, text_cells=True))
        else:
            blocks.append(MarkdownBlock("The recipes are the same."))
    if rows := [row for run in runs for row in _changed_settings(run, with_name=len(runs) > 1)]:
        blocks.append(ReportTable(["changed on resume", "after step", "from", "to"], rows, text_cells=True))
    blocks += [CodeBlock(f"config.yaml of {run.name}", run.config) for run in with_recipe if run.config]
    return Section("Settings", blocks)


def _changed_settings(run: RunResults, with_name: bool) -> list[list[str]]:
    """Return a row for each setting that was changed when the run resumed, without repeats by further restarts."""
    rows = []
    for start in run.starts:
        for key, (before, after) in start.get("changed", {}).items():
            row = [f"{run.name}: {key}" if with_name else key, str(start["step"]), str(before), str(after)]
            if row not in rows:
                rows.append(row)
    return rows


def _versions(runs: Sequence[RunResults]) -> Section:
    listed = {run.name: ", ".join(f"{name} {version}" for name, version in run.versions.items()) for run in runs}
    if len(set(listed.values())) == 1:
        return Section("Versions", [MarkdownBlock(next(iter(listed.values())))])
    return Section("Versions", [MarkdownBlock(f"{name}: {versions}") for name, versions in listed.items()])

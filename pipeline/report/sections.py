"""Content of a report: what each section says about the runs."""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.compare import MEAN, settings_warning, verdict
from pipeline.evaluation.accuracy import BY_SCRIPT, accuracy_table, unfinished_sentence
from pipeline.evaluation.consistency import agreement_sentences, agreement_table, output_languages_table
from pipeline.evaluation.details import detail_tables
from pipeline.report import plots, representation_plots
from pipeline.report.blocks import CodeBlock, MarkdownBlock, PlotBlock, ReportBlock, ReportTable, Section
from pipeline.report.main_table import difference_cell, main_table
from pipeline.report.overview_table import ABSENT, overview_rows
from pipeline.report.runs import MetricHistory, RunResults, languages_of, series
from pipeline.report.similarity_table import similarity_rows
from pipeline.representations.plots import label
from pipeline.representations.tables import POSITIONS, with_interval


def build_sections(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> list[Section]:
    """Build the sections of a report. Sections without content are omitted.

    Args:
        runs: results of the runs; the first one is the baseline.
        comparisons: comparison of each run with the baseline (`pipeline.compare`), by run name.
    """
    built = [
        _accuracy(runs, comparisons),
        _overview(runs),
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


def _accuracy(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> Section:
    evaluated = [run for run in runs if run.evaluation]
    blocks: list[ReportBlock] = []
    if len(evaluated) == 1 and evaluated[0].evaluation:
        blocks.append(MarkdownBlock(accuracy_table(evaluated[0].evaluation)))
    elif evaluated:
        order, _ = plots.ordered_languages(runs, _primary_languages(comparisons))
        header, rows = main_table(evaluated, comparisons, order)
        blocks += [ReportTable(header, rows, num_means=len(rows) - len(order)), MarkdownBlock(_main_note(comparisons))]
    if figure := plots.plot_accuracy(runs, _primary_languages(comparisons)):
        alt_text = "Bar chart of the accuracy per language with 95 % intervals; the table has the values."
        blocks.append(PlotBlock(figure, alt_text))
    for run in evaluated:
        prefix = f"{run.name}: " if len(evaluated) > 1 else ""
        blocks.append(MarkdownBlock(prefix + unfinished_sentence(run.evaluation or {})))
    blocks += [MarkdownBlock(_evaluated_model(run)) for run in evaluated]
    if evaluated:
        blocks.append(MarkdownBlock("The intervals of the accuracies are Wilson score intervals."))
    for run in evaluated:
        title = "what the token limit cut, and how answers were read" + (f": {run.name}" if len(evaluated) > 1 else "")
        if tables := detail_tables(run.evaluation or {}):
            blocks.append(MarkdownBlock(tables, summary=title))
    return Section("Accuracy per language", blocks)


def _primary_languages(comparisons: dict[str, dict[str, Any]]) -> list[str]:
    """Return the languages of the primary measure, or [] if it is the mean of all languages."""
    measures = [comparison["primary"] for comparison in comparisons.values()]
    return measures[0]["languages"] if measures and measures[0]["measure"] != MEAN else []


def _main_note(comparisons: dict[str, dict[str, Any]]) -> str:
    """Explain the columns of the main table."""
    note = "n: number of problems. Accuracy in percent, with its 95 % interval. "
    if comparisons:
        note += (
            "Differences in percentage points, on the records that both runs have, with the 95 % interval of a paired "
            "bootstrap over problems. Holm p: p-value of the difference, adjusted for the number of languages; "
            "p-values of means are not adjusted. "
        )
    return note + (
        "Unfinished: responses that were cut at the token limit. In the language: responses in the language of the "
        f"question, among those whose language was identified.{BY_SCRIPT}: judged by script alone, so responses in "
        "another language of the same script count too."
    )


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
        + "."
    )


def _differences(runs: Sequence[RunResults], comparisons: dict[str, dict[str, Any]]) -> Section:
    if not comparisons:
        return Section("", [])
    explanation = (
        f"Each run is compared with {runs[0].name} on the same problems. Gained and lost problems are those that only "
        "the run or only the baseline solves. The p-value is that of McNemar's exact test on these two counts, or of a "
        "paired t test for means over languages or samples. Holm p is adjusted for the number of languages."
    )
    order, _ = plots.ordered_languages(runs, _primary_languages(comparisons))
    alt_text = "Differences in accuracy with 95 % intervals; the table has the values."
    figure = plots.plot_differences(runs, comparisons, order)
    warnings = [f"{name}: {warning}" for name, c in comparisons.items() if (warning := settings_warning(c))]
    blocks: list[ReportBlock] = [MarkdownBlock("\n\n".join([*warnings, explanation]))]
    blocks.append(PlotBlock(figure, alt_text))
    header = ["language", "difference, points", "gained", "lost", "p", "Holm p", "in words"]
    for name, comparison in comparisons.items():
        mean = comparison["mean"]
        rows = [[f"{name}: mean of languages", difference_cell(mean), "", "", f"{mean['p']:.3g}", "", verdict(mean)]]
        for lang in order:
            if entry := comparison["languages"].get(lang):
                counts = [str(entry.get(key, ABSENT)) for key in ("gained", "lost")]
                tests = [f"{entry[key]:.3g}" for key in ("p", "p_holm")]
                rows.append([lang, difference_cell(entry), *counts, *tests, verdict(entry)])
        blocks.append(ReportTable(header, rows, num_means=1))
    return Section(f"Differences from {runs[0].name}", blocks)


def _consistency(runs: Sequence[RunResults]) -> Section:
    blocks: list[ReportBlock] = []
    if figure := plots.plot_agreement(runs):
        alt_text = "Heat maps of the fraction of problems to which two languages give the same answer."
        blocks.append(PlotBlock(figure, alt_text))
    for run in runs:
        if not run.evaluation:
            continue
        text, languages = agreement_sentences(run.evaluation), output_languages_table(run.evaluation)
        if text:
            blocks.append(MarkdownBlock(f"**{run.name}**\n\n{text}" if len(runs) > 1 else text))
        suffix = f": {run.name}" if len(runs) > 1 else ""
        if languages:
            blocks.append(MarkdownBlock(languages, summary=f"languages of the responses{suffix}" if suffix else ""))
        if matrix := agreement_table(run.evaluation):
            blocks.append(MarkdownBlock(matrix, summary=f"same answers, as a table{suffix}"))
    return Section("Agreement across languages, languages of the outputs", blocks)


def _representations(runs: Sequence[RunResults]) -> Section:
    figure, by_layer = representation_plots.plot_states(runs), representation_plots.plot_layers(runs)
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
    blocks.append(ReportTable(["", *metrics], rows))
    if differences := similarity_rows(runs):
        header = ["soft tokens of translations", *(f"{run.name} − {runs[0].name}" for run in runs[1:])]
        blocks.append(ReportTable(header, differences, text_cells=True))
    return Section("Representations", blocks)


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

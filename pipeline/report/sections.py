"""What a report says, in order: sections of paragraphs, tables, pictures and code, for Markdown and for HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from pipeline.evaluation.accuracy import accuracy_table
from pipeline.evaluation.consistency import agreement_sentences, agreement_table, output_languages_table, percent
from pipeline.report import plots
from pipeline.report.overview_table import ABSENT, glance
from pipeline.report.runs import Run, languages_of, series
from pipeline.representations.plots import label


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column is a heading of its row, the others are figures unless `words`."""

    header: list[str]
    rows: list[list[str]]
    words: bool = False
    tiles: bool = False  # of two columns: in HTML a tile for each row


@dataclass(frozen=True)
class Picture:
    """Of the HTML report; `text` says what it shows to who cannot see it."""

    figure: Figure
    text: str


@dataclass(frozen=True)
class Code:
    """Preformatted text, folded under its heading in HTML."""

    heading: str
    text: str


@dataclass(frozen=True)
class Markdown:
    """Paragraphs and tables that another module wrote; under `folded` in HTML, where a picture shows the same."""

    text: str
    folded: str = ""


Block = str | Table | Picture | Code | Markdown


@dataclass(frozen=True)
class Section:
    heading: str
    blocks: list[Block]


def sections(runs: Sequence[Run], comparisons: dict[str, dict[str, Any]]) -> list[Section]:
    """The whole report; `comparisons` holds, by run, the comparison with the first."""
    found = [
        _glance(runs),
        _accuracy(runs),
        _differences(runs, comparisons),
        _consistency(runs),
        _representations(runs),
        _training(runs),
        _settings(runs),
        _versions(runs),
    ]
    return [section for section in found if section.blocks]


def _glance(runs: Sequence[Run]) -> Section:
    table = Table(["", *(run.name for run in runs)], glance(runs), tiles=len(runs) == 1)
    return Section("At a glance", [table] if table.rows else [])


def _accuracy(runs: Sequence[Run]) -> Section:
    evaluated = [run for run in runs if run.evaluation]
    blocks: list[Block] = []
    if picture := plots.accuracies(runs):
        blocks.append(
            Picture(picture, "Bars of the accuracy per language with 95 % intervals; the table has the values.")
        )
    if len(evaluated) == 1 and evaluated[0].evaluation:
        blocks.append(Markdown(accuracy_table(evaluated[0].evaluation)))
    elif evaluated:
        blocks.append(_accuracies_side_by_side(evaluated))
    for run in evaluated:
        settings = (run.evaluation or {}).get("settings", {})
        blocks.append(
            f"{run.name}: model `{settings.get('model', '?')}`, problems `{settings.get('data', '?')}`; greedy, at "
            f"most {settings.get('max_new_tokens', '?')} tokens, dtype {settings.get('dtype', '?')}. Intervals are "
            "Wilson's."
        )
    return Section("Accuracy per language", blocks)


def _accuracies_side_by_side(runs: Sequence[Run]) -> Table:
    order, _ = plots.ordered_languages(runs)
    rows = []
    for lang in order:
        scores = [(run.evaluation or {})["languages"].get(lang) for run in runs]
        cells = [
            f"{percent(one['accuracy'])} ({percent(one['low'])} to {percent(one['high'])})" if one else ABSENT
            for one in scores
        ]
        rows.append([lang, *cells])
    means = [percent((run.evaluation or {})["macro"]["accuracy"]) for run in runs]
    return Table(["accuracy %", *(run.name for run in runs)], [*rows, ["mean of languages", *means]])


def _differences(runs: Sequence[Run], comparisons: dict[str, dict[str, Any]]) -> Section:
    if not comparisons:
        return Section("", [])
    blocks: list[Block] = [
        f"Each run against {runs[0].name} on the same problems: a paired bootstrap over problems gives the intervals, "
        "gained and lost count the problems that one of the two alone solves, p is McNemar's exact test of them.",
        Picture(
            plots.differences(runs, comparisons), "Differences in accuracy with intervals; the table has the values."
        ),
    ]
    header = ["", "difference, points", "95 % interval", "gained, lost", "McNemar p"]
    for name, found in comparisons.items():
        rows = [[f"{name}: mean of languages", *_difference(found["mean"]), "", ""]]
        for lang, one in found["languages"].items():
            rows.append([lang, *_difference(one), f"{one['gained']}, {one['lost']}", f"{one['mcnemar_p']:.3g}"])
        blocks.append(Table(header, rows))
    return Section(f"Differences from {runs[0].name}", blocks)


def _difference(one: dict[str, float]) -> list[str]:
    return [f"{100 * one['difference']:+.1f}", f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}"]


def _consistency(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    if picture := plots.agreement(runs):
        blocks.append(Picture(picture, "Share of problems to which two languages give the same answer, as heat maps."))
    for run in runs:
        if not run.evaluation:
            continue
        told = [agreement_sentences(run.evaluation), output_languages_table(run.evaluation)]
        if text := "\n\n".join(filter(None, told)):
            blocks.append(Markdown(f"**{run.name}**\n\n{text}" if len(runs) > 1 else text))
        if matrix := agreement_table(run.evaluation):
            blocks.append(Markdown(matrix, folded="equal answers as a table"))
    return Section("Agreement across languages, languages of the outputs", blocks)


def _representations(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    if not (picture := plots.scatters(runs)):
        return Section("", blocks)
    blocks.append(
        Picture(picture, "First two principal components of the final state and of the soft-token summaries.")
    )
    if by_layer := plots.layers(runs):
        blocks.append(Picture(by_layer, "Centred cosine, retrieval and silhouette by layer; floors dotted."))
    measured = [(run.name, run.representations) for run in runs if run.representations]
    _, first = measured[0]
    blocks.append(
        f"{first['problems']} problems in {len(first['languages'])} languages, pooled over each written-out answer. "
        "Dotted, and in brackets: the figure for shuffled pairs."
    )
    header = [
        "",
        "cosine",
        "centred cosine",
        "linear CKA",
        "P@1",
        "silhouette",
        "Davies-Bouldin",
        "k-means NMI",
        "probe",
    ]
    rows = []
    for name, result in measured:
        for state in ("final", "soft_tokens"):
            found = result["representations"][state]
            alike, apart = found["similarity"]["all"], found["separability"]
            pairs = [alike[metric] for metric in ("cosine", "centred_cosine", "cka", "retrieval")]
            rows.append(
                [
                    f"{name}: {label(state)}",
                    *(f"{one['value']:.3f} ({one['floor']:.3f})" for one in pairs),
                    *(f"{apart[metric]:.3f}" for metric in ("silhouette", "davies_bouldin", "kmeans_nmi", "probe")),
                ]
            )
    return Section("Representations", [*blocks, Table(header, rows)])


def _training(runs: Sequence[Run]) -> Section:
    trained = [run for run in runs if run.metrics]
    blocks: list[Block] = []
    if picture := plots.curves(runs):
        blocks.append(Picture(picture, "Losses and alignment cosine over the steps."))
    rows = []
    for key in ("loss", "ce_loss", "align_loss", "align_cos", "align_weight", "grad_norm", "learning_rate"):
        values = [series(run.metrics, key)[1] for run in trained]
        if any(values):
            rows.append([key, *(f"{found[0]:.5g} → {found[-1]:.5g}" if found else ABSENT for found in values)])
    if rows:
        blocks.append(Table(["first → last step", *(run.name for run in trained)], rows))
    languages = sorted({lang for run in trained for lang in languages_of(run.metrics)})
    rows = []
    for lang in languages:
        values = [series(run.metrics, f"ce_loss_{lang}")[1] for run in trained]
        rows.append([lang, *(f"{found[0]:.4f} → {found[-1]:.4f}" if found else ABSENT for found in values)])
    if rows:
        blocks.append(Table(["cross-entropy by language", *(run.name for run in trained)], rows))
    return Section("Training", blocks)


def _settings(runs: Sequence[Run]) -> Section:
    """The keys in which runs differ, then each recipe whole."""
    blocks: list[Block] = []
    with_recipe = [run for run in runs if run.config]
    if len(with_recipe) > 1:
        settings = [run.settings for run in with_recipe]
        keys = sorted({key for one in settings for key in one} - {"output_dir"})
        rows = [
            [key, *(str(one.get(key, ABSENT)) for one in settings)]
            for key in keys
            if len({repr(one.get(key, ABSENT)) for one in settings}) > 1
        ]
        if rows:
            blocks.append(Table(["differs", *(run.name for run in with_recipe)], rows, words=True))
        else:
            blocks.append("The recipes are the same.")
    blocks += [Code(f"config.yaml of {run.name}", run.config) for run in with_recipe if run.config]
    return Section("Settings", blocks)


def _versions(runs: Sequence[Run]) -> Section:
    listed = {run.name: ", ".join(f"{name} {version}" for name, version in run.versions.items()) for run in runs}
    if len(set(listed.values())) == 1:
        return Section("Versions", [next(iter(listed.values()))])
    return Section("Versions", [f"{name}: {versions}" for name, versions in listed.items()])

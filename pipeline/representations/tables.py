"""Markdown tables of the results: one main table, and the rest below it."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.representations.plots import label

POSITIONS = {
    "answer": "the answer's mean",
    "prompt": "the question's mean",
    "prompt_end": "the last token of the prompt",
    "own_answer": "the model's own answer's mean",
}
# Metrics with an interval whose differences between runs are reported: group, metric, heading.
MAIN_METRICS = (
    ("similarity", "retrieval", "P@1"),
    ("similarity", "debiased_cka", "debiased CKA"),
    ("similarity", "centred_cosine", "centred cosine"),
    ("variance", "language", "variance by language"),
    ("variance", "example", "by example"),
)
Cells = Callable[[dict[str, Any]], Sequence[str]]


def metrics_tables(result: dict[str, Any]) -> str:
    """Format a result: the main table, differences from a baseline, then the other metrics and positions."""
    positions = {result["position"]: result["representations"], **result["other_positions"]}
    main = POSITIONS[result["position"]]
    sections = [
        f"{result['problems']} problems in {len(result['languages'])} languages; states at {main}; similarity is the "
        "mean over all pairs of languages. In brackets 95 % intervals over problems.",
        _main_table(result["representations"]),
    ]
    if "baseline" in result:
        sections += [
            f"**Difference from {result['baseline']['name']}**, paired by problem. In bold, intervals without 0.",
            _difference_table(result["baseline"]["differences"]),
        ]
    sections += [
        "**Raw and z-scored by dimension**, with the values of shuffled pairs in parentheses. A few dimensions of "
        "large values can determine raw cosine and CKA.",
        _raw_table(result["representations"]),
        "**Separability of languages**",
        _separability_table(result["representations"]),
    ]
    for position, states in positions.items():
        if position != result["position"]:
            count = result["own_answers"] if position == "own_answer" else result["problems"]
            sections += [f"**States at {POSITIONS[position]}**, {count} problems", _main_table(states)]
    return "\n\n".join(sections)


def _main_table(states: dict[str, Any]) -> str:
    def cells(metrics: dict[str, Any]) -> list[str]:
        return [with_interval(_entry(metrics, group, metric)) for group, metric, _ in MAIN_METRICS]

    return _table([heading for _, _, heading in MAIN_METRICS], states, cells)


def _raw_table(states: dict[str, Any]) -> str:
    groups = (("similarity", ""), ("similarity_zscored", "z "))
    names = {"cosine": "cosine", "debiased_cka": "debiased CKA", "retrieval": "P@1"}
    columns = [(group, metric, prefix + names[metric]) for metric in names for group, prefix in groups]
    columns += [("similarity", "cka", "linear CKA"), ("similarity", "xsim_error", "xSIM error")]

    def cells(metrics: dict[str, Any]) -> list[str]:
        entries = [metrics[group]["all"][metric] for group, metric, _ in columns]
        zscored = metrics["variance_zscored"]["example"]["value"]
        return [*(f"{entry['value']:.3f} ({entry['floor']:.3f})" for entry in entries), f"{zscored:.3f}"]

    return _table([*(heading for _, _, heading in columns), "z variance by example"], states, cells)


def _separability_table(states: dict[str, Any]) -> str:
    def cells(metrics: dict[str, Any]) -> list[str]:
        values = metrics["separability"]
        numbers = [f"{values[name]:.3f}" for name in ("silhouette", "davies_bouldin", "kmeans_nmi")]
        return [*numbers, f"{values['probe']:.3f} ({values['probe_chance']:.3f})"]

    return _table(["silhouette", "Davies-Bouldin", "k-means NMI", "language probe (chance)"], states, cells)


def _difference_table(differences: dict[str, Any]) -> str:
    def cells(metrics: dict[str, Any]) -> list[str]:
        texts = []
        for group, metric, _ in MAIN_METRICS:
            entry = metrics[group][metric]
            text = with_interval(entry, "+.3f")
            texts.append(f"**{text}**" if entry["interval"][0] > 0 or entry["interval"][1] < 0 else text)
        return texts

    return _table([heading for _, _, heading in MAIN_METRICS], differences, cells)


def _entry(metrics: dict[str, Any], group: str, metric: str) -> dict[str, Any]:
    return metrics[group][metric] if group == "variance" else metrics[group]["all"][metric]


def with_interval(entry: dict[str, Any], spec: str = ".3f") -> str:
    """Format a value and its interval."""
    low, high = entry["interval"]
    return f"{entry['value']:{spec}} [{low:{spec}}, {high:{spec}}]"


def _table(headings: Sequence[str], states: dict[str, Any], cells: Cells) -> str:
    lines = [f"| states | {' | '.join(headings)} |", f"|---|{'---:|' * len(headings)}"]
    lines += [f"| {label(name)} | {' | '.join(cells(metrics))} |" for name, metrics in states.items()]
    return "\n".join(lines)

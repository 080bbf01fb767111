"""Measure the cross-lingual similarity and separability of a model's hidden states on questions and gold answers.

    python -m pipeline.representations --model runs/demo/hf --data runs/demo/train.test.jsonl --output runs/demo

Each question and its gold answer are encoded as in training. No text is generated. Only questions that exist in every
language are used, so that all languages are measured on the same questions. Writes `representations.json`, `.md` and
`.png`.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt

from data_prep.records import Record, read_records
from pipeline.checkpoint.export_record import check_not_stale
from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.optional_imports import import_optional
from pipeline.common.plotting import png
from pipeline.config.settings import ModelSettings
from pipeline.evaluation.accuracy import versions
from pipeline.evaluation.generation import load_for_generation
from pipeline.models.self_check import check_model
from pipeline.representations.plots import draw, label
from pipeline.representations.separability import principal_components, separability
from pipeline.representations.similarity import Metric, similarity_metrics
from pipeline.representations.states import FINAL, SOFT, encode, layer_name, pooled_states

DEFAULT_LAYERS = 9  # default number of (evenly spaced) layers to measure in a deeper model
MIN_GROUPS = 5


def measure_model(args: argparse.Namespace) -> None:
    """Run the model, compute all metrics, and write the three files.

    Raises:
        UserError: the model cannot be used, a record is malformed, there are too few questions, or a layer does not
            exist.
    """
    import_optional("sklearn.metrics")  # fail before the model runs
    records, languages, left_out = read_parallel_records(Path(args.data), args.limit)
    output = Path(args.output or args.model)
    check_not_stale(Path(args.model))
    model, tokenizer = load_for_generation(Path(args.model), args.dtype)
    check_model(model.config, ModelSettings(path=args.model))
    ensure_writable(output)
    layers = choose_layers(len(model.get_decoder().layers), args.layers)
    states = pooled_states(model, encode(tokenizer, records), layers, args.batch_size)
    result = {
        "settings": {name: value for name, value in vars(args).items() if value is not None},
        "versions": versions(),
        "pivot": args.pivot,
        "languages": languages,
        "problems": len(records) // len(languages),
        "problems_left_out": left_out,
        "representations": representation_metrics(states, languages, args.pivot, {layer_name(layers[-1]), FINAL, SOFT}),
    }
    tables = metrics_tables(result)
    write_atomically(output / "representations.png", png(draw(result)))
    write_atomically(output / "representations.md", f"# Representations of {args.model}\n\n{tables}\n".encode())
    write_atomically(output / "representations.json", (json.dumps(result, ensure_ascii=False) + "\n").encode())
    print(f"{tables}\n\nwritten: {output}/representations.json, representations.md, representations.png")


def read_parallel_records(path: Path, limit: int | None) -> tuple[list[Record], list[str], int]:
    """Read the records of the questions that exist in every language.

    Args:
        path: JSON Lines or Parquet file of canonical records with written-out answers.
        limit: use only the first `limit` questions.

    Returns:
        The records, ordered by language and with the questions in the same order in each language; the languages in
        alphabetical order; and the number of questions omitted because they are missing in some language.

    Raises:
        UserError: a record is malformed, there is only one language, or too few questions exist in every language.
    """
    by_lang: dict[str, dict[str, Record]] = {}
    order: dict[str, None] = {}
    for record in read_records([path]):
        by_lang.setdefault(record.lang, {}).setdefault(record.pair_id, record)
        order.setdefault(record.pair_id)
    if len(by_lang) < 2:
        raise UserError(f"{path}: only one language; similarity needs the same questions in two or more")
    complete = [pair_id for pair_id in order if all(pair_id in records for records in by_lang.values())]
    if limit is not None and limit < MIN_GROUPS:
        raise UserError(f"--limit {limit}: at least {MIN_GROUPS} questions are needed")
    if len(complete) < MIN_GROUPS:
        least = min(by_lang, key=lambda lang: len(by_lang[lang]))
        raise UserError(
            f"{path}: {len(complete)} questions exist in every language, at least {MIN_GROUPS} are needed; "
            f"{least} has the fewest records ({len(by_lang[least])})"
        )
    languages, kept = sorted(by_lang), complete[:limit]
    return [by_lang[lang][pair_id] for lang in languages for pair_id in kept], languages, len(order) - len(complete)


def choose_layers(depth: int, requested: Sequence[int] | None) -> list[int]:
    """Return the layers to measure, always including the last.

    Args:
        depth: number of layers of the model.
        requested: layers given on the command line; None for all layers, or for nine evenly spaced ones if the model
            has more.

    Raises:
        UserError: a requested layer does not exist.
    """
    if requested is None:
        return sorted({round(i) for i in np.linspace(0, depth, min(depth + 1, DEFAULT_LAYERS))})
    if missing := [layer for layer in requested if not 0 <= layer <= depth]:
        raise UserError(f"--layers {missing[0]}: the model has layers 0 (its embeddings) to {depth}")
    return sorted({*requested, depth})


def representation_metrics(
    states: dict[str, np.ndarray], languages: list[str], pivot: str, scattered: set[str]
) -> dict[str, dict[str, Any]]:
    """Compute all metrics of each representation.

    Args:
        states: [languages * G, d] by name, ordered by language and with the G questions in the same order.
        languages: the language codes.
        pivot: language of the `with_pivot` means.
        scattered: names of the representations to also compute scatter plot coordinates for.

    Returns:
        For each name: `similarity`, the mean over all pairs of languages (`all`) and over pairs with the pivot
        (`with_pivot`); `separability`; `pairs`, the similarity metrics of each pair of languages; and `scatter` if
        requested.

    Raises:
        UserError: a state is not finite.
    """
    metrics = {}
    for name, points in states.items():
        if not np.isfinite(points).all():
            raise UserError(f"{name}: not finite; the model's states overflow; use a different --dtype")
        per_language = dict(zip(languages, np.split(points, len(languages)), strict=True))
        pairs = {(a, b): similarity_metrics(per_language[a], per_language[b]) for a, b in combinations(languages, 2)}
        groups = np.tile(np.arange(len(points) // len(languages)), len(languages))
        point_languages = np.repeat(languages, len(points) // len(languages))
        metrics[name] = {
            "similarity": {
                "all": _mean_metrics(list(pairs.values())),
                "with_pivot": _mean_metrics([pair_metrics for pair, pair_metrics in pairs.items() if pivot in pair]),
            },
            "separability": separability(points, point_languages, groups),
            "pairs": _nested_values(pairs),
        }
        if name in scattered:
            metrics[name]["scatter"] = _scatter(points, languages)
    return metrics


def _mean_metrics(pairs: Sequence[dict[str, Metric]]) -> dict[str, dict[str, float]] | None:
    """Average values and chance levels over pairs of languages. Return None if there are no pairs."""
    if not pairs:
        return None
    return {
        name: {"value": fmean(pair[name].value for pair in pairs), "floor": fmean(pair[name].floor for pair in pairs)}
        for name in pairs[0]
    }


def _nested_values(pairs: dict[tuple[str, str], dict[str, Metric]]) -> dict[str, dict[str, dict[str, float]]]:
    nested: dict[str, dict[str, dict[str, float]]] = {}
    for (first, second), metrics in pairs.items():
        nested.setdefault(first, {})[second] = {name: metric.value for name, metric in metrics.items()}
    return nested


def _scatter(points: np.ndarray, languages: list[str]) -> dict[str, Any]:
    coordinates, variance = principal_components(points)
    rounded = coordinates / np.abs(coordinates).max(initial=1e-30)
    parts = np.split(rounded.round(4), len(languages))
    return {"variance": variance, "points": {lang: part.tolist() for lang, part in zip(languages, parts, strict=True)}}


def metrics_tables(result: dict[str, Any]) -> str:
    """Format similarity (with chance levels in parentheses) and separability as two Markdown tables."""
    names = ("cosine", "centred_cosine", "cka", "retrieval", "xsim_error")
    lines = [
        f"{result['problems']} problems in {len(result['languages'])} languages, mean over all pairs of languages; in "
        "parentheses the metric for shuffled pairs.",
        "",
        "| states | cosine | centred cosine | linear CKA | P@1 | xSIM error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, metrics in result["representations"].items():
        similarity = [metrics["similarity"]["all"][metric] for metric in names]
        cells = [f"{metric['value']:.3f} ({metric['floor']:.3f})" for metric in similarity]
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    lines += [
        "",
        "| states | silhouette | Davies-Bouldin | k-means NMI | language probe (chance) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, metrics in result["representations"].items():
        separation = metrics["separability"]
        lines.append(
            f"| {label(name)} | {separation['silhouette']:.3f} | {separation['davies_bouldin']:.2f} | "
            f"{separation['kmeans_nmi']:.3f} | {separation['probe']:.3f} ({separation['probe_chance']:.3f}) |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.representations", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="directory of a Hugging Face causal LM")
    parser.add_argument("--data", required=True, help="records with written-out answers, JSON Lines or Parquet")
    parser.add_argument("--output", help="directory for the result files; default: the model directory")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="0 is the embeddings; default: all, or nine evenly spaced ones"
    )
    parser.add_argument("--pivot", default="en", help="language of the with_pivot means")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="sequences per batch")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT questions")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser


if __name__ == "__main__":
    exit_cleanly(lambda: measure_model(build_parser().parse_args()))

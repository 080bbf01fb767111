"""Cross-lingual similarity and separability of a model's states on problems with their written-out answers.

    python -m pipeline.representations --model runs/demo/hf --data runs/demo/train.test.jsonl --output runs/demo

Each question and gold answer is read as in training, no text is generated. Writes `representations.json`, `.md` and
`.png`. Only problems that exist in every language count, so that all languages are measured on the same ones.
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
from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.optional_imports import import_optional
from pipeline.common.plotting import png
from pipeline.evaluation.accuracy import versions
from pipeline.evaluation.generation import load_model
from pipeline.models.families import FAMILIES
from pipeline.representations.plots import draw, label
from pipeline.representations.separability import principal_components, separability
from pipeline.representations.similarity import Figure, compare
from pipeline.representations.states import FINAL, SOFT, encode, layer_name, pooled_states

MANY_LAYERS = 9  # of a deep model so many are measured, evenly spaced
FEW_PROBLEMS = 5


def measure(args: argparse.Namespace) -> None:
    """Run the model, compute all figures, write the three files.

    Raises UserError for an unusable model, a bad record, too few problems, a layer that does not exist.
    """
    import_optional("sklearn.metrics")  # before the model runs
    records, languages, left_out = read_parallel(Path(args.data), args.limit)
    output = Path(args.output or args.model)
    model, tokenizer = load_model(Path(args.model), args.dtype)
    if model.config.model_type not in FAMILIES:
        raise UserError(f"{args.model}: model_type {model.config.model_type!r} is not one of {', '.join(FAMILIES)}")
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
        "representations": describe(states, languages, args.pivot, {layer_name(layers[-1]), FINAL, SOFT}),
    }
    write_atomically(output / "representations.png", png(draw(result)))
    text = f"# Representations of {args.model}\n\n{tables(result)}\n"
    write_atomically(output / "representations.md", text.encode())
    write_atomically(output / "representations.json", (json.dumps(result, ensure_ascii=False) + "\n").encode())
    print(f"{tables(result)}\n\nwritten: {output}/representations.json, representations.md, representations.png")


def read_parallel(path: Path, limit: int | None) -> tuple[list[Record], list[str], int]:
    """Records of the problems that exist in every language, language by language and in one order of problems.

    Returns them, the languages in alphabetical order, and how many problems were left out for want of a language.
    """
    by_lang: dict[str, dict[str, Record]] = {}
    order: dict[str, None] = {}
    for record in read_records([path]):
        by_lang.setdefault(record.lang, {}).setdefault(record.pair_id, record)
        order.setdefault(record.pair_id)
    if len(by_lang) < 2:
        raise UserError(f"{path}: only one language; similarity needs the same problems in two or more")
    complete = [pair_id for pair_id in order if all(pair_id in found for found in by_lang.values())]
    if limit is not None and limit < FEW_PROBLEMS:
        raise UserError(f"--limit {limit}: at least {FEW_PROBLEMS} problems are needed")
    if len(complete) < FEW_PROBLEMS:
        least = min(by_lang, key=lambda lang: len(by_lang[lang]))
        raise UserError(
            f"{path}: {len(complete)} problems are there in every language, at least {FEW_PROBLEMS} are needed; "
            f"{least} has the fewest records ({len(by_lang[least])})"
        )
    languages, kept = sorted(by_lang), complete[:limit]
    return [by_lang[lang][pair_id] for lang in languages for pair_id in kept], languages, len(order) - len(complete)


def choose_layers(depth: int, wanted: Sequence[int] | None) -> list[int]:
    """The wanted layers and always the last; by default all, or nine evenly spaced of a deeper model."""
    if wanted is None:
        return sorted({round(i) for i in np.linspace(0, depth, min(depth + 1, MANY_LAYERS))})
    if beyond := [layer for layer in wanted if not 0 <= layer <= depth]:
        raise UserError(f"--layers {beyond[0]}: the model has layers 0 (its embeddings) to {depth}")
    return sorted({*wanted, depth})


def describe(
    states: dict[str, np.ndarray], languages: list[str], pivot: str, scattered: set[str]
) -> dict[str, dict[str, Any]]:
    """All figures of each representation [languages * problems, d]; coordinates for a scatter of those in `scattered`.

    Under `similarity`, `all` is the mean over all pairs of languages and `with_pivot` over those with the pivot.
    """
    described = {}
    for name, points in states.items():
        if not np.isfinite(points).all():
            raise UserError(f"{name}: not finite; the model's states overflow, give another --dtype")
        per_language = dict(zip(languages, np.split(points, len(languages)), strict=True))
        pairs = {(a, b): compare(per_language[a], per_language[b]) for a, b in combinations(languages, 2)}
        problems = np.tile(np.arange(len(points) // len(languages)), len(languages))
        owners = np.repeat(languages, len(points) // len(languages))
        described[name] = {
            "similarity": {
                "all": _mean(list(pairs.values())),
                "with_pivot": _mean([found for pair, found in pairs.items() if pivot in pair]),
            },
            "separability": separability(points, owners, problems),
            "pairs": _nested(pairs),
        }
        if name in scattered:
            described[name]["scatter"] = _scatter(points, languages)
    return described


def _mean(found: Sequence[dict[str, Figure]]) -> dict[str, dict[str, float]] | None:
    """Mean values and floors of several pairs of languages; None of none."""
    if not found:
        return None
    return {
        metric: {"value": fmean(one[metric].value for one in found), "floor": fmean(one[metric].floor for one in found)}
        for metric in found[0]
    }


def _nested(pairs: dict[tuple[str, str], dict[str, Figure]]) -> dict[str, dict[str, dict[str, float]]]:
    nested: dict[str, dict[str, dict[str, float]]] = {}
    for (first, second), found in pairs.items():
        nested.setdefault(first, {})[second] = {metric: figure.value for metric, figure in found.items()}
    return nested


def _scatter(points: np.ndarray, languages: list[str]) -> dict[str, Any]:
    coordinates, variance = principal_components(points)
    rounded = coordinates / np.abs(coordinates).max(initial=1e-30)
    parts = np.split(rounded.round(4), len(languages))
    return {"variance": variance, "points": {lang: part.tolist() for lang, part in zip(languages, parts, strict=True)}}


def tables(result: dict[str, Any]) -> str:
    """Two Markdown tables: similarity with floors in brackets, and separability."""
    metrics = ("cosine", "centred_cosine", "cka", "retrieval", "xsim_error")
    lines = [
        f"{result['problems']} problems in {len(result['languages'])} languages, mean over all pairs of languages; in "
        "brackets the figure for shuffled pairs.",
        "",
        "| states | cosine | centred cosine | linear CKA | P@1 | xSIM error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in result["representations"].items():
        figures = [found["similarity"]["all"][metric] for metric in metrics]
        cells = [f"{figure['value']:.3f} ({figure['floor']:.3f})" for figure in figures]
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    lines += [
        "",
        "| states | silhouette | Davies-Bouldin | k-means NMI | language probe (chance) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in result["representations"].items():
        apart = found["separability"]
        lines.append(
            f"| {label(name)} | {apart['silhouette']:.3f} | {apart['davies_bouldin']:.2f} | "
            f"{apart['kmeans_nmi']:.3f} | {apart['probe']:.3f} ({apart['probe_chance']:.3f}) |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.representations", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="directory of a Hugging Face causal LM")
    parser.add_argument("--data", required=True, help="records with written-out answers, JSON Lines or Parquet")
    parser.add_argument("--output", help="where the files go; the model's directory if not given")
    parser.add_argument("--layers", type=int, nargs="+", help="0 is the embeddings; nine evenly spaced if not given")
    parser.add_argument("--pivot", default="en", help="language of the with_pivot means")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="sequences read at once")
    parser.add_argument("--limit", type=int, help="take only the first so many problems")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser


if __name__ == "__main__":
    exit_cleanly(lambda: measure(parser().parse_args()))

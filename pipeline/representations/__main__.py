"""Measure the cross-lingual similarity and separability of a model's hidden states on questions and answers.

    python -m pipeline.representations --model runs/mine/hf --data test.jsonl --output runs/mine

Each question and its gold answer are encoded as in training. No text is generated. Only questions that exist in every
language are used, so that all languages are measured on the same questions. Writes `representations.json`, `.md` and
`.png`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt

from data_prep.records import has_visible_text
from pipeline.checkpoint.export_record import check_not_stale
from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly, storage_errors, write_error
from pipeline.common.optional_imports import import_optional
from pipeline.common.plotting import png
from pipeline.config.settings import ModelSettings
from pipeline.evaluation.accuracy import versions
from pipeline.evaluation.generation import load_for_generation
from pipeline.models.self_check import check_model
from pipeline.representations.baseline import differences_from
from pipeline.representations.inputs import ParallelRecords, own_answers, read_parallel_records
from pipeline.representations.metrics import representation_metrics
from pipeline.representations.plots import draw
from pipeline.representations.states import FINAL, SOFT, encode, layer_name, pooled_states, select_positions
from pipeline.representations.tables import metrics_tables

DEFAULT_LAYERS = 9  # default number of (evenly spaced) layers to measure in a deeper model
AT = ("answer", "prompt", "prompt_end")


def measure_model(args: argparse.Namespace) -> None:
    """Run the model, compute all metrics, and write the three files.

    Raises:
        UserError: the model cannot be used, a record is malformed, there are too few questions, or a layer does not
            exist.
    """
    import_optional("sklearn.metrics")  # fail before the model runs
    parallel = read_parallel_records(Path(args.data), args.limit)
    own = own_answers(parallel, Path(args.generations)) if args.generations else None
    output = Path(args.output or args.model)
    check_not_stale(Path(args.model))
    model, tokenizer = load_for_generation(Path(args.model), args.dtype, trust_remote_code=args.trust_remote_code)
    check_model(model.config, ModelSettings(path=args.model, trust_remote_code=args.trust_remote_code))
    ensure_writable(output)
    layers = choose_layers(len(model.get_decoder().layers), args.layers)
    scattered = {layer_name(layers[-1]), FINAL, SOFT}

    def measure(records: ParallelRecords, at: str, main: bool) -> dict[str, Any]:
        encoded = select_positions(encode(tokenizer, records.records), at)
        # The embedding of the last token is the same in all prompts.
        chosen = [layer for layer in layers if layer or at != "prompt_end"]
        states = pooled_states(model, encoded, chosen, args.batch_size)
        return representation_metrics(states, records.languages, args.pivot, scattered if main else set(), main)

    positions = args.at or default_positions(parallel)
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if value is not None},
        "versions": versions(),
        "pivot": args.pivot,
        "languages": parallel.languages,
        "problems": len(parallel.pair_ids),
        "problems_left_out": parallel.left_out,
        "pair_ids": parallel.pair_ids,
        "position": positions[0],
        "representations": measure(parallel, positions[0], main=True),
        "other_positions": {at: measure(parallel, at, main=False) for at in positions[1:]},
    }
    if own:
        result["own_answers"] = len(own.pair_ids)
        result["other_positions"]["own_answer"] = measure(own, "answer", main=False)
    if args.baseline:
        result["baseline"] = differences_from(Path(args.baseline), result)
    tables = metrics_tables(result)
    with storage_errors(output, write_error):
        write_atomically(output / "representations.png", png(draw(result)))
        write_atomically(output / "representations.md", f"# Representations of {args.model}\n\n{tables}\n".encode())
        write_atomically(output / "representations.json", (json.dumps(result, ensure_ascii=False) + "\n").encode())
    print(f"{tables}\n\nwritten: {output}/representations.json, representations.md, representations.png")


def default_positions(parallel: ParallelRecords) -> Sequence[str]:
    """Return all positions, or only the answer if a record has no question, as in parallel text."""
    prompts = ["".join(message["content"] for message in record.messages[:-1]) for record in parallel.records]
    return AT if all(map(has_visible_text, prompts)) else AT[:1]


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


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.representations", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="directory of a Hugging Face causal LM")
    parser.add_argument("--data", required=True, help="records with answers, or parallel text; JSON Lines or Parquet")
    parser.add_argument("--output", help="directory for the result files; default: the model directory")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="0 is the embeddings; default: all, or nine evenly spaced ones"
    )
    parser.add_argument(
        "--at",
        nargs="+",
        choices=AT,
        help="positions to average over: the answer, the question, or the last token of the prompt; the first is the "
        "one of the main table and the plots; default: all that the data has",
    )
    parser.add_argument("--generations", help="generations.jsonl of this model: also measure its own answers")
    parser.add_argument("--baseline", help="directory with the representations.json of another model to compare with")
    parser.add_argument("--pivot", default="en", help="language of the with_pivot means")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="sequences per batch")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT questions")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the model's repository")
    return parser


if __name__ == "__main__":
    exit_cleanly(lambda: measure_model(build_parser().parse_args()))

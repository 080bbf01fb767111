"""Export a checkpoint as a Hugging Face model: `python -m pipeline.export --checkpoint DIR --output HFDIR`.

Tensors are merged from the ranks' partitions one tensor at a time, and at most one output file is held in memory.
Vocabulary padding is removed. `export.json` records the run, the step and the data type, README.md is a model card.
A finished run calls `export_finished_run` unless training.export_at_end is false.
"""

import argparse
import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint import layout
from pipeline.checkpoint.export_record import (
    EXPORT_FILE,
    ExportRecord,
    checkpoint_id,
    read_export_record,
    relative_directory,
    write_export_record,
)
from pipeline.checkpoint.hf_weights import file_tensors, merged_tensors, write_weights
from pipeline.checkpoint.hub import push_to_hub
from pipeline.checkpoint.model_card import write_model_card
from pipeline.checkpoint.resume import find_resumable
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.config.changes import saved_config
from pipeline.config.settings import Config
from pipeline.models.loading import DTYPES
from pipeline.models.stop_tokens import stop_strings, stop_token_ids
from pipeline.training.metrics_reader import read_metrics, read_validations

EXPORT_DIRECTORY = "hf"  # of a finished run, in its output_dir


def export(
    source: Path, output: Path, dtype: str | None = None, update: bool = False, best: bool = False
) -> ExportRecord | None:
    """Write safetensors, config, tokenizer, chat template and model card of a checkpoint.

    Args:
        source: Checkpoint directory, or the output_dir of a run to export its newest checkpoint.
        output: Directory to create.
        dtype: Data type of the weights, a key of `DTYPES`; None: that of the export to update, or else that of the
            base model, so that both are evaluated in the same one, or else the precision that the run was trained in.
        update: If `output` is an export of the same run, keep it if it is up to date, or else replace it.
        best: Export the best checkpoint of the run by `training.metric_for_best_model` instead of its newest one.

    Returns:
        The record of the export, or None if `output` has none and was kept; see `_is_newer_export_without_record`.

    Raises:
        UserError: There is no complete checkpoint, there is no best one and `best` is set, or `output` is not empty or
            cannot be written.
    """
    output = output.resolve()  # replace the target of a symbolic link, not the link
    newest = not best and not (source / layout.COMPLETE_MARKER).is_file()
    if best:
        source = _best_checkpoint(source)
    elif newest:
        source = layout.newest_checkpoint(source) or source
    state = layout.read_state(source)
    if update and _is_newer_export_without_record(output, source):
        print(f"note: {output}: has no {EXPORT_FILE}; kept, because its weights are newer than {source.name}")
        return None
    with layout.reading(source / "config.yaml"):
        recipe = saved_config((source / "config.yaml").read_text(encoding="utf-8"))
    record = ExportRecord(
        run=recipe.output_dir,
        step=state["step"],
        checkpoint=checkpoint_id(source),
        dtype=dtype or base_dtype(source) or recipe.training.precision,
        checkpoints=relative_directory(source.parent, output),
        newest=newest,
        run_id=state.get("run_id", ""),
    )
    if existing := _existing_export(output, source, record, update):
        record = dataclasses.replace(record, dtype=dtype or existing.dtype)
        if existing.checkpoint == record.checkpoint and existing.dtype == record.dtype:
            if existing != record:  # the run or the export has been moved, or now the newest checkpoint is asked for
                write_export_record(output, record)
            return record
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_files(source, state, record, partial)
        write_model_card(partial, record, dataclasses.asdict(recipe), state, _metrics_at(source.parent, state["step"]))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{output}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    if output.exists():
        _replace(output, partial)
    else:
        os.replace(partial, output)
    _check_tokenizer(source / "tokenizer", output)
    return record


def _best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run by its last validation. Raises UserError if the run has none."""
    validations = read_validations(run)
    step = validations[-1].get("best_step") if validations else None
    if step is None:
        raise UserError(
            f"{run}: no best checkpoint; give the output_dir of a run with training.metric_for_best_model, or export "
            "without --best"
        )
    return run / f"checkpoint-{step}"


def export_finished_run(config: Config) -> None:
    """Export the last checkpoint of a finished run to `hf` in its output_dir, in the data type of the base model.

    Raises:
        UserError: The export cannot be written. The checkpoint is kept, and starting the run again repeats the export.
    """
    checkpoint, output = find_resumable(config), Path(config.output_dir) / EXPORT_DIRECTORY
    if checkpoint is None:
        return
    try:
        record = export(checkpoint.parent, output, update=True)
    except UserError as error:
        command = f"python -m pipeline.export --checkpoint {checkpoint.parent} --output {output}"
        raise UserError(f"{error}; training is finished and {checkpoint} is kept; export it with: {command}") from error
    if record is not None:
        print(f"{output}: step {record.step} in {record.dtype}", flush=True)


def check_export_target(config: Config) -> None:
    """Check before training that the export of the finished run may be written.

    Raises:
        UserError: OUTPUT/hf exists and is not an export of a run in this directory.
    """
    output = Path(config.output_dir) / EXPORT_DIRECTORY
    if output.exists() and any(output.iterdir()) and read_export_record(output) is None:
        raise UserError(
            f"{output}: not an export of this run, which would replace it at the end; move it, or set "
            "training.export_at_end to false"
        )


def base_dtype(source: Path) -> str | None:
    """Return the data type of the base model, a key of `DTYPES`, or None if its configuration names no such type."""
    dtype = layout.read_model_config(source).dtype
    return next((name for name, each in DTYPES.items() if each == dtype), None)


def _metrics_at(run: Path, step: int) -> dict[str, Any]:
    """Return the metrics of a step, or an empty dictionary if the run's directory has none."""
    return next((record for record in read_metrics(run) if record["step"] == step), {})


def _replace(output: Path, partial: Path) -> None:
    """Replace an export. Raises UserError if its directory has files of another origin, such as evaluation results."""
    written = {path.name for path in partial.iterdir()}
    others = [path.name for path in output.iterdir() if path.name not in written and ".safetensors" not in path.name]
    if others:
        shutil.rmtree(partial)
        listed = ", ".join(sorted(others))
        raise UserError(f"{output}: has files that the export did not write ({listed}); move them first")
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old)


def _is_newer_export_without_record(output: Path, source: Path) -> bool:
    """Return whether a directory has weights that are newer than a checkpoint, and no record.

    Earlier versions wrote no record. The weights cannot be of an older checkpoint then, unless they were copied.
    """
    weights = [path.stat().st_mtime for path in output.glob("*.safetensors")]
    marker = source / layout.COMPLETE_MARKER
    return bool(weights) and not (output / EXPORT_FILE).exists() and min(weights) > marker.stat().st_mtime


def _existing_export(output: Path, source: Path, record: ExportRecord, update: bool) -> ExportRecord | None:
    """Return the record of an export that `record` may replace, or None if the directory is missing or empty.

    Raises:
        UserError: The directory may not be replaced.
    """
    if not output.exists() or not any(output.iterdir()):
        return None
    existing = read_export_record(output)
    if not update:
        hint = "; --update replaces an older export of the same run" if existing else ""
        raise UserError(f"{output}: exists and is not empty; give another --output or remove it{hint}")
    if existing is None:
        raise UserError(
            f"{output}: has no {EXPORT_FILE} and is not newer than {source}; if it is an export by an earlier version, "
            "remove it, or else give another --output"
        )
    if not existing.is_same_run(record.run_id, record.checkpoints):
        reason = f"an export of another run ({existing.run})"
        if not (existing.run_id and record.run_id):
            reason = f"an export by an earlier version, of a run in {(output / existing.checkpoints).resolve()}"
        raise UserError(f"{output}: {reason}; give another --output or remove it")
    return existing


def _write_files(source: Path, state: dict[str, Any], record: ExportRecord, directory: Path) -> None:
    """Write all files of an export."""
    dtype = DTYPES[record.dtype]
    config = layout.read_model_config(source)
    config.vocab_size, config.dtype = state["vocab_size"], dtype
    config.save_pretrained(directory)
    shutil.copytree(source / "tokenizer", directory, dirs_exist_ok=True)
    # Inference engines such as vLLM read stop tokens from the generation config. The end-of-turn token of the chat
    # template is one of them, and may differ from the model's own.
    tokenizer = load_tokenizer(source / "tokenizer")
    stop_tokens = stop_token_ids(config.eos_token_id, tokenizer)
    generation = GenerationConfig(
        eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id, stop_strings=stop_strings(tokenizer)
    )
    generation.save_pretrained(directory)
    write_weights(file_tensors(config, merged_tensors(source, state, dtype)), directory)
    write_export_record(directory, record)


def _check_tokenizer(original: Path, output: Path) -> None:
    """Warn if AutoTokenizer does not load the same tokenizer.

    This happens for model types that have their own tokenizer class.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, packed = AutoTokenizer.from_pretrained(output), load_tokenizer(original)
    # The fingerprint does not cover the decoder, whose JSON is comparable within one version of the library.
    decoders = [json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] for tokenizer in (loaded, packed)]
    if fingerprint(loaded) != fingerprint(packed) or decoders[0] != decoders[1]:
        print(
            f"warning: {output}: AutoTokenizer uses the tokenizer class of the model type and tokenizes or decodes "
            "differently; load it with PreTrainedTokenizerFast.from_pretrained"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint-N, or an output_dir to use its newest checkpoint"
    )
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face directory to create")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="data type of the weights; default: that of the updated export, or of the base model",
    )
    parser.add_argument(
        "--update", action="store_true", help="replace an older export of the same run; keep one that is up to date"
    )
    parser.add_argument(
        "--best", action="store_true", help="export the best checkpoint of the run by training.metric_for_best_model"
    )
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the export to the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", default=None, help="create a private Hub repository")
    args = parser.parse_args()
    record = export(args.checkpoint, args.output, args.dtype, args.update, args.best)
    if record is not None:
        print(f"{args.output}: step {record.step} of {args.checkpoint} in {record.dtype}", flush=True)
    if args.push_to_hub and record is not None:
        print(f"pushed to {push_to_hub(args.output, args.push_to_hub, args.private, record)}")


if __name__ == "__main__":
    exit_cleanly(main)

"""Export a checkpoint as a Hugging Face model: `python -m pipeline.export --checkpoint DIR --output HFDIR`.

Tensors are merged from the ranks' partitions one tensor at a time, and at most one output file is held in memory.
Vocabulary padding is removed. `export.json` records the run, the step and the data type, README.md is a model card.
A finished run calls `export_finished_run` unless training.export_at_end is false.
"""

import argparse
import dataclasses
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.checkpoint import layout
from pipeline.checkpoint.export_files import (
    check_no_other_files,
    remove_abandoned,
    replace_directory,
    warn_if_tokenizer_differs,
    write_files,
)
from pipeline.checkpoint.export_record import (
    EXPORT_FILE,
    ExportRecord,
    checkpoint_id,
    is_newer_without_record,
    read_export_record,
    relative_directory,
    replaceable_export,
    run_id,
    update_export_record,
)
from pipeline.checkpoint.hub import push_to_hub
from pipeline.checkpoint.model_card import write_model_card
from pipeline.checkpoint.resume import find_resumable
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.config.changes import saved_config
from pipeline.config.settings import Config
from pipeline.evaluation.progress import find_evaluation
from pipeline.models.loading import DTYPES
from pipeline.training.best_metric import stops_early
from pipeline.training.metrics_reader import read_metrics, read_validations
from pipeline.training.state import ValidationState

EXPORT_DIRECTORY = "hf"  # of a finished run, in its output_dir


def export(
    source: Path,
    output: Path,
    dtype: str | None = None,
    update: bool = False,
    best: bool = False,
    keep_if_evaluated: bool = False,
    merge: bool = False,
) -> ExportRecord | None:
    """Write safetensors, config, tokenizer, chat template and model card of a checkpoint.

    If the run trains an adapter, the export is the adapter, or the base model with the adapter merged into it.

    Args:
        source: Checkpoint directory, or the output_dir of a run to export its newest checkpoint.
        output: Directory to create.
        dtype: Data type of the weights, a key of `DTYPES`; None: that of the export to update, or else that of the
            base model, so that both are evaluated in the same one, or else the precision that the run was trained in.
        update: If `output` is an export of the same run, keep it if it is up to date, or if the newest checkpoint is
            asked for and it was made for a named or the best one, or else replace it.
        best: Export the best checkpoint of the run by `training.metric_for_best_model` instead of its newest one.
        keep_if_evaluated: Keep `output` also if an evaluation of it is in progress. For the end of a run.
        merge: Merge the adapter into its base model. An update of a merged model merges too.

    Returns:
        The record of `output`, or None if it has none and was kept; see `is_newer_without_record`.

    Raises:
        UserError: There is no complete (with `best`, no best) checkpoint, or `output` is not empty or not writable.
    """
    named, output = output, output.resolve()  # replace the target of a symbolic link, not the link
    source, newest = _select_checkpoint(source, best)
    state = layout.read_state(source)
    if update and is_newer_without_record(output, source):
        print(f"note: {output}: has no {EXPORT_FILE}; kept, because its weights are newer than {source.name}")
        return None
    with layout.reading(source / "config.yaml"):
        recipe = saved_config((source / "config.yaml").read_text(encoding="utf-8"))
    if merge and recipe.model.adapter.r is None:
        raise UserError(f"{source}: has no adapter to merge; export it without --merge")
    record = _record(source, output, recipe, state, dtype, newest)
    record = dataclasses.replace(record, adapter=recipe.model.adapter.r is not None and not merge)
    existing = replaceable_export(output, source, record, update)
    if existing:
        record = dataclasses.replace(record, dtype=dtype or existing.dtype, adapter=record.adapter and existing.adapter)
        if existing.has_same_weights(record):
            return update_export_record(output, existing, record)
        if _is_kept(named, existing, source, newest, keep_if_evaluated):
            return existing
    partial = _write_partial(source, output, recipe, state, record, at_end=keep_if_evaluated)
    try:  # again, because an evaluation may have begun meanwhile
        if existing and _is_kept(named, existing, source, newest, keep_if_evaluated):
            return existing
        replace_directory(output, partial)
    except OSError as error:
        raise UserError(f"{output}: cannot be replaced ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    warn_if_tokenizer_differs(source / "tokenizer", output)
    return record


def _record(
    source: Path, output: Path, recipe: Config, state: dict[str, Any], dtype: str | None, newest: bool
) -> ExportRecord:
    """Return the record of an export to write; see `export`."""
    return ExportRecord(
        run=recipe.output_dir,
        step=state["step"],
        checkpoint=checkpoint_id(source),
        dtype=dtype or base_dtype(source, recipe.model.trust_remote_code) or recipe.training.precision,
        checkpoints=relative_directory(source.parent, output),
        newest=newest,
        run_id=state.get("run_id", ""),
    )


def _write_partial(
    source: Path, output: Path, recipe: Config, state: dict[str, Any], record: ExportRecord, at_end: bool
) -> Path:
    """Write an export to a temporary directory beside `output` and return it.

    Its name has a random part, because another job may export an earlier checkpoint of a run while the run exports its
    last checkpoint. That of the run itself, of which there is one at a time, is fixed: after a signal or a kill, the
    restarted run replaces what is left.

    Raises:
        UserError: It cannot be written.
    """
    name = "end" if at_end else uuid.uuid4().hex[:8]
    partial = output.with_name(f".{output.name}.{name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        remove_abandoned(output)
        partial.mkdir(parents=True)
        write_files(source, recipe.model, state, record, partial)
        write_model_card(partial, record, dataclasses.asdict(recipe), state, _metrics_at(source.parent, state["step"]))
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not (source / layout.COMPLETE_MARKER).exists():
            raise UserError(
                f"{source}: was deleted during the export, as the run has saved newer ones; export again"
            ) from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"{output}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    return partial


def _is_kept(output: Path, existing: ExportRecord, source: Path, newest: bool, keep_if_evaluated: bool) -> bool:
    """Return whether to keep an export of another checkpoint, and print a note if so. See `export`.

    Raises:
        UserError: It is not to be kept, but has files of another origin.
    """
    if newest and not existing.newest:
        print(
            f"note: {output}: kept, because it was made for a named or the best checkpoint (step {existing.step}); "
            f"to export {source.name}, remove it or give another --output"
        )
        return True
    if keep_if_evaluated and (log := find_evaluation(output)):
        print(
            f"note: {output}: step {existing.step} is kept, because {log} belongs to an evaluation of it; when that "
            f"has finished, run: python -m pipeline.export --checkpoint {source.parent} --output {output} --update"
        )
        return True
    check_no_other_files(output, source)
    return False


def _select_checkpoint(source: Path, best: bool) -> tuple[Path, bool]:
    """Return the checkpoint to export, and whether it is exported because it is the newest one of its run."""
    if best:
        return _best_checkpoint(source), False
    if (source / layout.COMPLETE_MARKER).is_file():
        return source, False
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; give the output_dir of a run or one of its checkpoints")
    return layout.newest_checkpoint(source) or source, True


def _best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run, which its last validation names. Raises UserError if it has none."""
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
        record = export(checkpoint.parent, output, update=True, keep_if_evaluated=True)
    except UserError as error:
        command = f"python -m pipeline.export --checkpoint {checkpoint.parent} --output {output}"
        message = f"{error}; training is finished and {checkpoint} is kept; export it with: {command}"
        raise type(error)(message) from error  # a StorageError has a status of its own
    if record is not None:
        print(f"{output}: step {record.step} in {record.dtype}", flush=True)


def check_export_target(config: Config, max_steps: int) -> None:
    """Check before training that the export of the finished run may be written.

    Args:
        config: The recipe.
        max_steps: Last step of the run.

    Raises:
        UserError: OUTPUT/hf is not an export of this run, or the export would replace it and it has other files.
    """
    output = Path(config.output_dir) / EXPORT_DIRECTORY
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    existing, checkpoint = read_export_record(output), find_resumable(config)
    # A run without checkpoints is new, so the export is of another run.
    if not (existing and checkpoint) or not existing.is_same_run(
        run_id(checkpoint), relative_directory(checkpoint.parent, output)
    ):
        raise UserError(
            f"{output}: not an export of this run, which would replace it at the end; move it, or set "
            "training.export_at_end to false"
        )
    state = layout.read_state(checkpoint)
    validation = ValidationState(**state.get("validation", {}))
    finished = state["step"] >= max_steps or stops_early(config.training, validation)
    up_to_date = finished and existing.checkpoint == checkpoint_id(checkpoint)
    if existing.newest and not up_to_date:
        check_no_other_files(output, checkpoint)


def base_dtype(source: Path, trust_remote_code: bool = False) -> str | None:
    """Return the data type of the base model, a key of `DTYPES`, or None if its configuration names no such type."""
    dtype = layout.read_model_config(source, trust_remote_code).dtype
    return next((name for name, each in DTYPES.items() if each == dtype), None)


def _metrics_at(run: Path, step: int) -> dict[str, Any]:
    """Return the metrics of a step, or an empty dictionary if the run's directory has none."""
    return next((record for record in read_metrics(run) if record["step"] == step), {})


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
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base model")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the export to the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", default=None, help="create a private Hub repository")
    args = parser.parse_args()
    record = export(args.checkpoint, args.output, args.dtype, args.update, args.best, merge=args.merge)
    if record is not None:
        print(f"{args.output}: step {record.step} of {args.checkpoint} in {record.dtype}", flush=True)
    if args.push_to_hub and record is not None:
        print(f"pushed to {push_to_hub(args.output, args.push_to_hub, args.private, record)}")


if __name__ == "__main__":
    exit_cleanly(main)

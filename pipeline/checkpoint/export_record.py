"""Record of the checkpoint that an exported model was made from: `export.json` in its directory."""

import dataclasses
import os
from pathlib import Path

from pipeline.checkpoint.layout import COMPLETE_MARKER, newest_checkpoint, step_of
from pipeline.common.atomic_io import read_json_or_none, write_json
from pipeline.common.errors import UserError

EXPORT_FILE = "export.json"


@dataclasses.dataclass(frozen=True)
class ExportRecord:
    """Origin of an exported model.

    Attributes:
        run: `output_dir` in the recipe of the run.
        step: Step of the checkpoint.
        checkpoint: Random id of the checkpoint, from its COMPLETE file. Different weights have different ids.
        dtype: Data type of the exported weights, a key of `DTYPES`.
        checkpoints: Directory of the run's checkpoints, relative to the export, so that both can be moved together.
        newest: Whether the newest checkpoint was asked for. If so, the export is stale once there is a newer one.
        run_id: Random id of the run. Empty if an older version saved the checkpoint or wrote the export.
        adapter: Whether it is an adapter without its base model.
    """

    run: str
    step: int
    checkpoint: str
    dtype: str
    checkpoints: str
    newest: bool
    run_id: str = ""
    adapter: bool = False

    def is_same_run(self, run_id: str, checkpoints: str) -> bool:
        """Return whether the export is of the run with these values of `run_id` and `checkpoints`.

        The directories decide only if an id is missing, because a run can be moved or copied.
        """
        return self.run_id == run_id if self.run_id and run_id else self.checkpoints == checkpoints

    def has_same_weights(self, other: "ExportRecord") -> bool:
        """Return whether two exports have the same weights in the same form."""
        return (self.checkpoint, self.dtype, self.adapter) == (other.checkpoint, other.dtype, other.adapter)


def checkpoint_id(path: Path) -> str:
    """Return the random id of a finished checkpoint, or an empty string if its COMPLETE file is unreadable."""
    return str((read_json_or_none(path / COMPLETE_MARKER) or {}).get("id", ""))


def run_id(path: Path) -> str:
    """Return the id of the run that saved a checkpoint, or an empty string if it has none."""
    return str((read_json_or_none(path / "trainer_state.json") or {}).get("run_id", ""))


def relative_directory(checkpoints: Path, export: Path) -> str:
    """Return `ExportRecord.checkpoints` for these directories."""
    return os.path.relpath(checkpoints.resolve(), export.resolve())


def write_export_record(directory: Path, record: ExportRecord) -> None:
    """Write the record of an exported model.

    Raises:
        OSError: The file cannot be written.
    """
    write_json(directory / EXPORT_FILE, dataclasses.asdict(record))


def read_export_record(directory: Path) -> ExportRecord | None:
    """Return the record of an exported model, or None if the directory is any other model.

    Raises:
        UserError: The record is damaged.
    """
    path = directory / EXPORT_FILE
    if not path.is_file():
        return None
    try:
        return ExportRecord(**(read_json_or_none(path) or {}))
    except TypeError:
        raise UserError(f"{path}: damaged record of an export; remove {directory} and export again") from None


def update_export_record(output: Path, existing: ExportRecord, record: ExportRecord) -> ExportRecord:
    """Write `record` to an export with the same weights if it differs from the existing one, and return it.

    It differs if the run or the export has been moved, or if a checkpoint is now asked for by name.
    """
    record = dataclasses.replace(record, newest=record.newest and existing.newest)
    if existing != record:
        write_export_record(output, record)
    return record


def replaceable_export(output: Path, source: Path, record: ExportRecord, update: bool) -> ExportRecord | None:
    """Return the record of an export that `record` may replace, or None if the directory is missing or empty.

    Raises:
        UserError: The directory may not be replaced.
    """
    if output.is_file():
        raise UserError(f"{output}: is a file; give a directory with --output")
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


def is_newer_without_record(output: Path, source: Path) -> bool:
    """Return whether a directory has weights that are newer than a checkpoint, and no record.

    Earlier versions wrote no record. The weights cannot be of an older checkpoint then, unless they were copied.
    """
    weights = [path.stat().st_mtime for path in output.glob("*.safetensors")]
    marker = source / COMPLETE_MARKER
    return bool(weights) and not (output / EXPORT_FILE).exists() and min(weights) > marker.stat().st_mtime


def newer_checkpoint(directory: Path, record: ExportRecord) -> Path | None:
    """Return the run's newest checkpoint if it is newer than the exported one, or None. Ignores `record.newest`.

    It is looked for where the run was, relative to the export.
    """
    newest = newest_checkpoint((directory.resolve() / record.checkpoints).resolve())
    if newest is None or step_of(newest) < record.step:  # the exported checkpoint has been deleted
        return None
    if not record.is_same_run(run_id(newest), record.checkpoints):  # another run has been put there
        return None
    return newest if checkpoint_id(newest) != record.checkpoint else None


def check_not_stale(directory: Path) -> ExportRecord | None:
    """Return the record of an exported model, or None if the directory is any other model.

    Raises:
        UserError: The run has a newer checkpoint, or the record is damaged.
    """
    record = read_export_record(directory)
    if record and record.newest and (newest := newer_checkpoint(directory, record)):
        raise UserError(
            f"{directory}: stale export of step {record.step}, the run has {newest.name}; export again: "
            f"python -m pipeline.export --checkpoint {newest.parent} --output {directory} --update"
        )
    return record

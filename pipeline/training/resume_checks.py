"""Compare a run with the checkpoint that it resumes from: refuse what must not change, and list what did."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint.export_record import run_id
from pipeline.checkpoint.layout import list_checkpoints, read_model_config, reading
from pipeline.checkpoint.resume import check_resumable, find_resumable
from pipeline.common.errors import StorageError, UserError
from pipeline.config.changes import Change, changed_settings, saved_config
from pipeline.config.settings import Config
from pipeline.training.preflight import PreparedRun, count_steps
from pipeline.training.schedules import alignment_weight, embedding_learning_rate, learning_rate

# Entries of a Hugging Face configuration that do not change the training of a checkpoint's weights. `vocab_size` is
# checked with its padding.
IRRELEVANT_TO_TRAINING = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "vocab_size"}


class Jump(NamedTuple):
    """Jump of a scheduled value at a checkpoint.

    Attributes:
        metric: its name in metrics.jsonl.
        name: its name in messages.
        before: value at the last step before the checkpoint.
        after: value at the next step.
    """

    metric: str
    name: str
    before: float
    after: float


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a run resumes from.

    Attributes:
        path: the checkpoint directory.
        state: its trainer_state.json.
        changes: settings that differ from the checkpoint's.
        jumps: scheduled values that the changes make jump.
    """

    path: Path
    state: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    jumps: list[Jump] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the changes and the jumps as JSON, for starts.jsonl: [before, after] by name."""
        record: dict[str, Any] = {}
        if self.changes:
            record["changed"] = {change.key: [change.before, change.after] for change in self.changes}
        return record | {jump.metric: [jump.before, jump.after] for jump in self.jumps}

    def notes(self) -> list[str]:
        """Return a line for each thing that the user should know."""
        lines = []
        if not self.state.get("fingerprints"):
            lines.append(f"warning: {self.path}: has no fingerprint of its data, so the data cannot be compared")
        if self.changes:
            lines.append(f"note: settings changed since {self.path}: {', '.join(map(str, self.changes))}")
        step = self.state["step"]
        return lines + [
            f"note: the {name} changes from {before:.3g} (step {step}) to {after:.3g} (next step)"
            for _, name, before, after in self.jumps
        ]


def find_resume_point(run: PreparedRun) -> ResumePoint | None:
    """Find the newest checkpoint of a run without verifying its checksums, and compare it with the run.

    Returns:
        The checkpoint, or None if the run has not saved any.

    Raises:
        UserError: see `find_resumable` and `compare_with_checkpoint`.
    """
    path = find_resumable(run.config)
    return None if path is None else compare_with_checkpoint(run, path)


def compare_with_checkpoint(run: PreparedRun, path: Path) -> ResumePoint:
    """Compare a run with a checkpoint.

    Raises:
        UserError: the run must not resume from it, it is of another run, or it is past the last step of the run.
    """
    with reading(path / "config.yaml"):
        before = saved_config((path / "config.yaml").read_text(encoding="utf-8"))
    _check_own_copy(path, Path(before.output_dir), Path(run.config.output_dir))
    state = check_resumable(path, run.identity)
    _check_model_config(path, run)
    changes = changed_settings(before, run.config)
    if refused := [change for change in changes if change.rule is None]:
        listed = ", ".join(map(str, refused))
        raise UserError(f"{path}: cannot resume with other settings: {listed}; restore them or use another output_dir")
    if state["step"] > run.max_steps:
        raise UserError(
            f"{path}: is past the last step of this run ({run.max_steps}); raise training.max_steps or "
            "training.num_train_epochs, or use another output_dir"
        )
    return ResumePoint(path, state, changes, _jumps(run, before, state["step"]))


def _jumps(run: PreparedRun, before: Config, step: int) -> list[Jump]:
    """Return the scheduled values that do not continue the schedule of the checkpoint."""
    now, planned = run.config, count_steps(before.training, len(run.shards))
    if step == 0 or step == run.max_steps:
        return []

    def values(config: Config, step: int, max_steps: int) -> list[float | None]:
        return [
            learning_rate(config.training, step, max_steps),
            embedding_learning_rate(config.training, step, max_steps),
            alignment_weight(config.loss, step, max_steps),
        ]

    names = ("learning_rate", "embedding_learning_rate", "align_weight")
    labels = ("learning rate", "learning rate of the input embedding", "alignment weight")
    last, expected, following = (
        values(before, step - 1, planned),
        values(before, step, planned) if step < planned else [None] * len(names),
        values(now, step, run.max_steps),
    )
    return [
        Jump(metric, name, was, value)
        for metric, name, was, next_value, value in zip(names, labels, last, expected, following, strict=True)
        if was is not None and value is not None and value not in (was, next_value)
    ]


def _check_own_copy(path: Path, owner: Path, output_dir: Path) -> None:
    """Check that a checkpoint in `training.copy_checkpoints_to` is not of another run that uses the same directory.

    Args:
        path: the checkpoint.
        owner: the output_dir of the run that saved it.
        output_dir: the output_dir of this run.

    Raises:
        UserError: `owner` is another directory and still has checkpoints of that run.
    """
    if path.parent == output_dir or owner.resolve() == output_dir.resolve():
        return
    saved: list[Path] = []
    with suppress(StorageError):  # output_dir was changed because the old one cannot be read
        saved = list_checkpoints(owner)
    if saved and run_id(saved[-1]) == run_id(path):
        raise UserError(
            f"{path}: a checkpoint of the run in {owner}; give this run another training.copy_checkpoints_to, or to "
            f"continue that run in {output_dir}, move its directory there"
        )


def _check_model_config(path: Path, run: PreparedRun) -> None:
    saved = read_model_config(path, run.config.model.trust_remote_code).to_dict()
    here = run.model_config.to_dict()
    for key in sorted(saved.keys() | here.keys()):
        if key in IRRELEVANT_TO_TRAINING or key.endswith("_token_id"):
            continue
        if saved.get(key) != here.get(key):
            raise UserError(
                f"{path}: checkpoint of a different model ({key} {saved.get(key)}, here {here.get(key)}); "
                "use another output_dir"
            )

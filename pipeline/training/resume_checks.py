"""Compare a run with the checkpoint that it resumes from: refuse what must not change, and list what did."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from pipeline.checkpoint.resume import check_resumable, find_resumable
from pipeline.common.errors import UserError
from pipeline.config.changes import Change, changed_settings, saved_config
from pipeline.config.settings import TrainingSettings
from pipeline.training.preflight import PreparedRun, count_steps
from pipeline.training.schedules import learning_rate

# Entries of a Hugging Face configuration that do not change the training of a checkpoint's weights. `vocab_size` is
# checked with its padding.
IRRELEVANT_TO_TRAINING = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "vocab_size"}


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a run resumes from.

    Attributes:
        path: the checkpoint directory.
        state: its trainer_state.json.
        changes: settings that differ from the checkpoint's.
        learning_rates: learning rate of the last step before the checkpoint and of the next step, if the changes make
            it jump; otherwise None.
    """

    path: Path
    state: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    learning_rates: tuple[float, float] | None = None

    def record(self) -> dict[str, Any]:
        """Return the changes as JSON, for starts.jsonl: [before, after] by setting."""
        record: dict[str, Any] = {}
        if self.changes:
            record["changed"] = {change.key: [change.before, change.after] for change in self.changes}
        if self.learning_rates:
            record["learning_rate"] = list(self.learning_rates)
        return record

    def notes(self) -> list[str]:
        """Return a line for each thing that the user should know."""
        lines = []
        if not self.state.get("fingerprints"):
            lines.append(f"warning: {self.path}: has no fingerprint of its data, so the data cannot be compared")
        if self.changes:
            lines.append(f"note: settings changed since {self.path}: {', '.join(map(str, self.changes))}")
        if self.learning_rates:
            before, after = self.learning_rates
            step = self.state["step"]
            lines.append(f"note: the learning rate changes from {before:.3g} (step {step}) to {after:.3g} (next step)")
        return lines


def find_resume_point(run: PreparedRun) -> ResumePoint | None:
    """Return the newest intact checkpoint of a run after comparing it with the run, or None if there is none.

    Raises:
        UserError: the run must not resume from it, or it is past the last step of the run.
    """
    path = find_resumable(run.config)
    if path is None:
        return None
    state = check_resumable(path, run.identity)
    _check_model_config(path, run.model_config)
    before = saved_config((path / "config.yaml").read_text(encoding="utf-8"))
    changes = changed_settings(before, run.config)
    if refused := [change for change in changes if change.rule is None]:
        listed = ", ".join(map(str, refused))
        raise UserError(f"{path}: cannot resume with other settings: {listed}; restore them or use another output_dir")
    if state["step"] > run.max_steps:
        raise UserError(
            f"{path}: is past the last step of this run ({run.max_steps}); raise training.max_steps or "
            "training.num_train_epochs, or use another output_dir"
        )
    return ResumePoint(path, state, changes, _rate_jump(run, before.training, state["step"]))


def _rate_jump(run: PreparedRun, before: TrainingSettings, step: int) -> tuple[float, float] | None:
    """Return the last and the next learning rate, or None if the schedule of the checkpoint continues."""
    planned = count_steps(before, len(run.shards))
    if step == 0 or step == run.max_steps:
        return None
    last, following = learning_rate(before, step - 1, planned), learning_rate(run.config.training, step, run.max_steps)
    continues = step < planned and following == learning_rate(before, step, planned)
    return None if continues or following == last else (last, following)


def _check_model_config(path: Path, current: PreTrainedConfig) -> None:
    saved = AutoConfig.from_pretrained(path / "model_config").to_dict()
    here = current.to_dict()
    for key in sorted(saved.keys() | here.keys()):
        if key in IRRELEVANT_TO_TRAINING or key.endswith("_token_id"):
            continue
        if saved.get(key) != here.get(key):
            raise UserError(
                f"{path}: checkpoint of a different model ({key} {saved.get(key)}, here {here.get(key)}); "
                "use another output_dir"
            )

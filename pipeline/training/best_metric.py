"""The validation metric that selects the best checkpoint and ends a run early."""

import hashlib
from typing import Any

from pipeline.common import distributed
from pipeline.common.errors import UserError
from pipeline.config.settings import Config, TrainingSettings
from pipeline.training.state import TrainState, ValidationState

COSINE = "eval_align_cos"
ALIGNMENT_METRICS = ["eval_alignment", COSINE]


def check_metric(metric: str | None, shards: str, manifest: dict[str, Any]) -> None:
    """Check that validation measures `training.metric_for_best_model`.

    Args:
        metric: the setting.
        shards: the validation shards, for the error message. manifest: their manifest.

    Raises:
        UserError: the metric is unknown, of a language that the shards lack, or of pairs and the shards have none.
    """
    names = ["eval_loss", "eval_ce"]
    names += ALIGNMENT_METRICS if manifest["totals"]["pairs"] else []
    names += [f"eval_ce_{lang}" for lang in manifest["languages"]]
    if metric is not None and metric not in names:
        raise UserError(
            f"training.metric_for_best_model: no metric {metric!r} on {shards}; choose one of {', '.join(names)}"
        )


def greater_is_better(training: TrainingSettings) -> bool:
    """Return whether a greater value of the metric is better. All metrics but the cosine are losses."""
    if training.greater_is_better is not None:
        return training.greater_is_better
    return training.metric_for_best_model == COSINE


def criterion(config: Config, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Return what must be equal for two values of the metric to be comparable: `ValidationState.criterion`.

    Args:
        config: the recipe.
        manifest: manifest of the validation shards, or None.
    """
    training = config.training
    if training.metric_for_best_model is None or manifest is None:
        return {}
    weight = {"alignment_weight": config.loss.alignment_weight} if training.metric_for_best_model == "eval_loss" else {}
    return {
        "metric": training.metric_for_best_model,
        "greater_is_better": greater_is_better(training),
        "eval_shards": rows_fingerprint(manifest),
        **weight,
    }


def stops_early(training: TrainingSettings, validation: ValidationState) -> bool:
    """Return whether the metric has not improved for `training.early_stopping_patience` validations."""
    patience = training.early_stopping_patience
    return patience is not None and validation.without_improvement >= patience


def early_stopping_message(state: TrainState) -> str:
    """Describe in one line why a run ended early."""
    validation = state.validation
    metric, best = validation.criterion["metric"], validation.best_metric
    return (
        f"stopped early after step {state.step}: {metric} has not improved for {validation.without_improvement} "
        f"validations; best: {'none' if best is None else f'{best:.4f} at step {validation.best_step}'}"
    )


def resume(criterion: dict[str, Any], saved: dict[str, Any]) -> ValidationState:
    """Return the progress of validation in a checkpoint, or a fresh one if the criterion has changed.

    Args:
        criterion: that of this run.
        saved: the state in the checkpoint; empty if there is no checkpoint or it is older than validation.
    """
    if saved and saved["criterion"] == criterion:
        return ValidationState(**saved)
    if saved and saved["best_step"] is not None and distributed.is_main_process():
        before, step = saved["criterion"]["metric"], saved["best_step"]
        print(f"note: validation has changed, so the best checkpoint by {before}, step {step}, is not kept", flush=True)
    return ValidationState(criterion)


def rows_fingerprint(manifest: dict[str, Any]) -> str:
    """Return a hash of the rows of a shard directory."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()

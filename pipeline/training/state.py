"""Progress of a run."""

import math
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ValidationState:
    """Progress of validation, with the best value of `training.metric_for_best_model`.

    Attributes:
        criterion: what must be equal for two values of the metric to be comparable: its name and direction, the
            validation data and, for `eval_loss`, the alignment weight.
        step: optimizer step of the last validation, 0 if there was none.
        best_step: step of the best validation, or None.
        best_metric: its value, or None.
        without_improvement: number of validations since the best one.
    """

    criterion: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    without_improvement: int = 0

    def update(self, step: int, value: float, greater_is_better: bool) -> bool:
        """Record the value of `metric_for_best_model`. Return whether it is the best so far. NaN never is.

        Does not set `self.step`, the step of the last validation, because a validation need not compute this metric.
        """
        sign = 1 if greater_is_better else -1
        improved = not math.isnan(value) and (self.best_metric is None or sign * value > sign * self.best_metric)
        if improved:
            self.best_step, self.best_metric = step, value
        self.without_improvement = 0 if improved else self.without_improvement + 1
        return improved


@dataclass
class TrainState:
    """Progress of a run, stored in checkpoints in addition to weights, optimizer state and data position.

    Attributes:
        step: number of finished optimizer steps.
        num_tokens: number of tokens trained on, without padding.
        recent_ce: cross entropies of the last steps, from which a loss jump is detected.
        validation: progress of validation.
        run_id: random id, made at the first start of a run. That of rank 0 is stored in checkpoints and exports.
    """

    step: int = 0
    num_tokens: int = 0
    recent_ce: list[float] = field(default_factory=list)
    validation: ValidationState = field(default_factory=ValidationState)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)

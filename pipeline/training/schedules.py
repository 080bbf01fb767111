"""Schedules of the learning rate and the alignment weight."""

import math
from dataclasses import replace

from pipeline.config.settings import TrainingSettings
from pipeline.loss import LossSettings


def learning_rate(training: TrainingSettings, step: int, max_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Warm up linearly, then keep the rate constant or decay it to 0 (linear or half-cosine). Unlike
    `transformers.get_scheduler`, step 0 already has a rate above 0: (step + 1) / warmup_steps of the peak.
    """
    warmup_steps = round(training.warmup_ratio * max_steps)
    peak = training.learning_rate
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if training.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if training.lr_scheduler_type == "linear":
        return peak * (1 - progress)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)))


def embedding_learning_rate(training: TrainingSettings, step: int, max_steps: int) -> float | None:
    """Return the learning rate of the input embedding at step `step`, or None if it has none of its own.

    It has the schedule of `learning_rate` and the peak `training.embedding_learning_rate`.
    """
    if training.embedding_learning_rate is None:
        return None
    return learning_rate(replace(training, learning_rate=training.embedding_learning_rate), step, max_steps)


def alignment_weight(loss: LossSettings, step: int, max_steps: int) -> float:
    """Return the alignment weight of optimizer step `step`, counted from 0. It warms up linearly from 0."""
    warmup_steps = round(loss.alignment_warmup_ratio * max_steps)
    return loss.alignment_weight * min(1.0, step / warmup_steps if warmup_steps else 1.0)

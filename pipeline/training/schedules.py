"""Schedules of the learning rate and the alignment weight."""

import math

from pipeline.config.settings import TrainingSettings
from pipeline.loss import LossSettings


def learning_rate(t: TrainingSettings, step: int, max_steps: int) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then constant, linear or half-cosine decay to 0."""
    warmup = round(t.warmup_ratio * max_steps)
    if step < warmup:
        return t.learning_rate * (step + 1) / warmup
    if t.lr_scheduler_type == "constant":
        return t.learning_rate
    done = (step - warmup) / max(1, max_steps - warmup)
    return t.learning_rate * ((1 - done) if t.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def alignment_weight(settings: LossSettings, step: int, max_steps: int) -> float:
    """Of optimizer step `step` (from 0): rises linearly from 0 over the warm-up."""
    warmup = round(settings.alignment_warmup_ratio * max_steps)
    return settings.alignment_weight * min(1.0, step / warmup if warmup else 1.0)

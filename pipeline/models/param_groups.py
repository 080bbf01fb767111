"""Group parameters for AdamW."""

from typing import Any

from torch import nn

from pipeline.config.settings import TrainingSettings


def adamw_arguments(module: nn.Module, t: TrainingSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups of parameters and options for AdamW: weight decay on matrices, none on vectors. Also under ZeRO-3."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": t.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options = {"lr": t.learning_rate, "betas": (t.adam_beta1, t.adam_beta2), "eps": t.adam_epsilon}
    return [group for group in groups if group["params"]], options

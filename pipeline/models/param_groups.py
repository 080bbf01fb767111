"""Group parameters for AdamW."""

from typing import Any

from torch import nn

from pipeline.config.settings import TrainingSettings


def adamw_arguments(module: nn.Module, training: TrainingSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the parameter groups and the keyword arguments for AdamW.

    Matrices have weight decay. Vectors (norms, biases) have none. Works for plain and for ZeRO-3 parameters.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    return [group for group in groups if group["params"]], options

"""Group parameters for AdamW, and set the learning rates of the groups."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from pipeline.config.settings import TrainingSettings

EMBEDDING = "embedding"  # value of the key `name` in the group of the input embedding


def adamw_arguments(
    module: nn.Module, embedding: nn.Parameter, training: TrainingSettings
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the parameter groups and the keyword arguments for AdamW.

    Matrices have weight decay. Vectors (norms, biases) have none. The input embedding is in a group of its own if
    `training.embedding_learning_rate` is set. Frozen parameters are in no group. Works for plain and for ZeRO-3
    parameters.

    Args:
        module: the model.
        embedding: its input embedding, which is also the head if they are tied.
        training: settings of AdamW.
    """
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if parameter is embedding and training.embedding_learning_rate is not None:
            embeddings.append(parameter)
        else:
            (matrices if len(shape) > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {
            "params": embeddings,
            "weight_decay": training.weight_decay,
            "lr": training.embedding_learning_rate,
            "name": EMBEDDING,
        },
        {"params": vectors, "weight_decay": 0.0},
    ]
    options = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    return [group for group in groups if group["params"]], options


def set_learning_rates(groups: Iterable[dict[str, Any]], value: float, embedding_value: float | None = None) -> None:
    """Set the learning rate of all parameter groups of an optimizer.

    Args:
        groups: groups that `adamw_arguments` returned, in the optimizer.
        value: learning rate.
        embedding_value: learning rate of the input embedding, if it has a group of its own.
    """
    for group in groups:
        is_embedding = group.get("name") == EMBEDDING
        group["lr"] = embedding_value if is_embedding and embedding_value is not None else value

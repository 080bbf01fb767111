"""Hidden states of a middle decoder layer, for `loss.pooling_tokens: hidden_states`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.loss import LossSettings


def aligned_layer(settings: LossSettings, num_layers: int) -> int | None:
    """Return the number of decoder layers below the aligned hidden states, or None if the loss aligns none."""
    if settings.pooling_tokens != "hidden_states":
        return None
    return settings.layer or max(1, num_layers // 2)


def check_layer(settings: LossSettings, config: PreTrainedConfig) -> None:
    """Check that a model has the layer whose hidden states are aligned, and at least one above it.

    Raises:
        UserError: it has not.
    """
    layer = aligned_layer(settings, config.num_hidden_layers)
    if layer is not None and layer >= config.num_hidden_layers:
        raise UserError(
            f"loss.layer {layer} is not a middle layer of the model, which has {config.num_hidden_layers} decoder "
            f"layers; choose a smaller one"
        )


def check_trained_below(settings: LossSettings, model: PreTrainedModel) -> None:
    """Check that the aligned hidden states depend on a trained parameter, of an adapted layer or the input embedding.

    Raises:
        UserError: they do not, and `alignment_weight` is not 0.
    """
    layers = model.get_decoder().layers
    layer = aligned_layer(settings, len(layers))
    if layer is None or not settings.alignment_weight:
        return
    parts = [model.get_input_embeddings(), *layers[:layer]]
    if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        raise UserError(
            f"model.adapter.target_modules: has no module in the first {layer} decoder layers, whose hidden states are "
            "aligned (see loss.layer), so nothing is aligned; add one, or set loss.alignment_weight to 0"
        )


@contextmanager
def record_output(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the outputs of a decoder layer within the context.

    Activation checkpointing runs the layer again in backward, outside the context, so that nothing is recorded twice.

    Yields:
        A list that receives the hidden states of each forward pass, as part of the autograd graph.
    """
    outputs: list[Tensor] = []

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    # DeepSpeed's hooks were registered before, so `output` is what the next layer receives.
    hook = layer.register_forward_hook(record)
    try:
        yield outputs
    finally:
        hook.remove()

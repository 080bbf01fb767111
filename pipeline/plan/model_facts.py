"""Sizes of a model: its parameters by module, from the model on the meta device."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.common.errors import UserError
from pipeline.config.settings import AdapterSettings
from pipeline.models.adapters import adapted_meta_model
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.plan.activations import NO_ADAPTER, run_decoder, shallow_model

BASE_LAYER = ".base_layer"  # what `peft` appends to the name of a layer that it adapts


@dataclass(frozen=True)
class ModelStats:
    """Sizes of a model, in elements.

    Attributes:
        config: the model configuration with the padded vocabulary.
        layers: parameter sizes of each module of each decoder layer, in forward order.
        final: parameter sizes of the modules after the last layer.
        trained: sizes of the trained parameters of each decoder layer and, last, of the modules after them, in the
            order in which DeepSpeed reduces their gradients: matrices first.
        vocabulary: sizes of the input embedding, and of the head and its bias if they are not tied.
        matrices: sizes of all trained parameters with more than one dimension.
        vectors: sizes of all other trained parameters, which form a separate optimizer group.
        frozen_matrices, frozen_vectors: the same of the frozen parameters.
        tied: whether the head is the input embedding.
        softcap: whether the logits are soft-capped.
        adapter: adapter settings; `r` is None for full fine-tuning. Modules that are adapted in some layers only are
            named as if they were adapted in all (see `_same_in_all_layers`).
    """

    config: PreTrainedConfig
    layers: tuple[tuple[tuple[int, ...], ...], ...]
    final: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]
    vocabulary: tuple[int, ...]
    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    frozen_matrices: tuple[int, ...]
    frozen_vectors: tuple[int, ...]
    tied: bool
    softcap: bool
    adapter: AdapterSettings

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @cached_property
    def decoder_parameters(self) -> int:
        """Number of parameters outside the vocabulary."""
        return sum(sum(module) for layer in (*self.layers, self.final) for module in layer)

    @cached_property
    def parameters(self) -> int:
        return self.decoder_parameters + sum(self.vocabulary)

    @cached_property
    def decoder_matrix_elements(self) -> int:
        """Number of elements in the matrices that the decoder multiplies each token with."""
        return sum(self.matrices + self.frozen_matrices) - self._vocabulary_elements

    @cached_property
    def trained_matrix_elements(self) -> int:
        """Number of those elements that are trained."""
        return sum(self.matrices) - (0 if self.adapter.freezes_embeddings else self._vocabulary_elements)

    @property
    def _vocabulary_elements(self) -> int:
        """Number of elements in the vocabulary matrices."""
        return sum(n for n in self.vocabulary if n >= self.hidden_size * self.vocab_size)

    @cached_property
    def flops_per_token(self) -> float:
        """6 FLOPs per trained and 4 per frozen parameter, as for the MFU in metrics.jsonl."""
        return 6.0 * self.parameters - 2.0 * sum(self.frozen_matrices + self.frozen_vectors)


def model_stats(config: PreTrainedConfig, adapter: AdapterSettings = NO_ADAPTER) -> ModelStats:
    """Read the sizes from the model on the meta device. `config.vocab_size` is the padded size.

    Raises:
        UserError: the model has experts or convolutions, whose cost is not that of a matrix product for each token.
    """
    model = adapted_meta_model(config, adapter)
    decoder = model.get_decoder()
    if any(p.dim() > 2 for p in decoder.parameters()):
        raise UserError(
            f"model_type {config.model_type!r}: memory and time are predicted for dense decoder layers only, not for "
            "experts or convolutions"
        )
    ends = [vocabulary_parameter(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    head = head_config(model)
    vocabulary = ends[:1] if head.tied else ends
    if head.bias is not None:
        vocabulary = [*vocabulary, head.bias]
    adapter = _same_in_all_layers(decoder.layers, adapter)
    order = _forward_order(config, adapter)
    modules_by_layer = [_modules_in_order(layer, order) for layer in decoder.layers]
    inner = {id(p) for layer in decoder.layers for p in layer.parameters()} | {id(p) for p in vocabulary}
    final = [m for m in decoder.modules() if any(id(p) not in inner for p in m.parameters(recurse=False))]
    sizes: dict[tuple[bool, bool], list[int]] = defaultdict(list)
    for p in model.parameters():
        sizes[p.requires_grad, p.dim() > 1].append(p.numel())
    return ModelStats(
        config=config,
        layers=tuple(tuple(map(_own_sizes, modules)) for modules in modules_by_layer),
        final=tuple(map(_own_sizes, final)),
        trained=tuple(map(_trained_sizes, [*modules_by_layer, final])),
        vocabulary=tuple(p.numel() for p in vocabulary),
        matrices=tuple(sizes[True, True]),
        vectors=tuple(sizes[True, False]),
        frozen_matrices=tuple(sizes[False, True]),
        frozen_vectors=tuple(sizes[False, False]),
        tied=head.tied,
        softcap=head.softcap is not None,
        adapter=adapter,
    )


def _same_in_all_layers(layers: Iterable[nn.Module], adapter: AdapterSettings) -> AdapterSettings:
    """Return settings that adapt in every layer what is adapted in any of these layers.

    Activations are traced in models with fewer layers, for which `target_modules` may name none. If it names some
    layers only, the memory of the others is overestimated.
    """
    adapted = [
        frozenset(name.removesuffix(BASE_LAYER) for name, _ in layer.named_modules() if name.endswith(BASE_LAYER))
        for layer in layers
    ]
    if len(set(adapted)) == 1:
        return adapter
    return replace(adapter, target_modules=tuple(sorted(frozenset().union(*adapted))))


def _modules_in_order(layer: nn.Module, order: list[str]) -> list[nn.Module]:
    """Return the modules of a layer that own parameters. `order`: see `_forward_order`; names it lacks are skipped."""
    modules = dict(layer.named_modules())
    names = (name if name in modules else name.removesuffix(BASE_LAYER) for name in order)
    return [modules[name] for name in names if name in modules]


def _own_sizes(module: nn.Module) -> tuple[int, ...]:
    """Return the sizes of the parameters that a module owns."""
    return tuple(p.numel() for p in module.parameters(recurse=False))


def _trained_sizes(owners: list[nn.Module]) -> tuple[int, ...]:
    """Return the sizes of the trained parameters that modules own, matrices first."""
    trained = [p for module in owners for p in module.parameters(recurse=False) if p.requires_grad]
    return tuple(p.numel() for p in sorted(trained, key=lambda p: p.dim() == 1))


def _forward_order(config: PreTrainedConfig, adapter: AdapterSettings) -> list[str]:
    """Return the names of a layer's modules that own parameters, in the order in which forward first executes them."""
    model = shallow_model(config, 1, "fp32", "sdpa", adapter)
    layer, order = model.get_decoder().layers[0], []
    for name, module in layer.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    run_decoder(model, torch.empty(1, 4, config.hidden_size, device="meta"))
    return list(dict.fromkeys(order))  # DoRA executes some twice

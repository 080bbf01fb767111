"""Sizes of a model: parameters by module, and the activations of a layer, traced on the meta device.

The decoder runs forward and backward without data, and all live storages are counted. The numbers therefore follow the
code in transformers for every model family. Only attention is replaced, by a function that allocates the same tensors
as the kernels of the attention implementation.

Shape letters: B rows, N tokens of a row, H heads, D head size, d hidden size.
"""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.loading import DTYPES, meta_model
from pipeline.plan.storage_tracker import StorageTracker
from pipeline.plan.traced_attention import MASKED_ATTENTION, VARIABLE_LENGTH, TracedExchange


@dataclass(frozen=True)
class ModelStats:
    """Sizes of a model, in elements.

    Attributes:
        config: the model configuration with the padded vocabulary.
        layers: parameter sizes of each module of each decoder layer, in forward order.
        final: parameter sizes of the modules after the last layer.
        vocabulary: sizes of the input embedding, and of the head and its bias if they are not tied.
        matrices: sizes of all parameters with more than one dimension.
        vectors: sizes of all other parameters, which form a separate optimizer group.
        tied: whether the head is the input embedding.
        softcap: whether the logits are soft-capped.
    """

    config: PreTrainedConfig
    layers: tuple[tuple[tuple[int, ...], ...], ...]
    final: tuple[tuple[int, ...], ...]
    vocabulary: tuple[int, ...]
    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    tied: bool
    softcap: bool

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
        return sum(self.matrices) - sum(n for n in self.vocabulary if n >= self.hidden_size * self.vocab_size)


def model_stats(config: PreTrainedConfig) -> ModelStats:
    """Read the sizes from the model on the meta device. `config.vocab_size` is the padded size.

    Raises:
        UserError: the model has experts or convolutions, whose cost is not that of a matrix product for each token.
    """
    model = meta_model(config)
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
    order = _forward_order(config)
    layers = tuple(_module_sizes(layer, order) for layer in decoder.layers)
    inner = {id(p) for layer in decoder.layers for p in layer.parameters()} | {id(p) for p in vocabulary}
    final = tuple(
        tuple(p.numel() for p in module.parameters(recurse=False))
        for module in decoder.modules()
        if any(id(p) not in inner for p in module.parameters(recurse=False))
    )
    parameters = list(model.parameters())
    return ModelStats(
        config=config,
        layers=layers,
        final=final,
        vocabulary=tuple(p.numel() for p in vocabulary),
        matrices=tuple(p.numel() for p in parameters if p.dim() > 1),
        vectors=tuple(p.numel() for p in parameters if p.dim() == 1),
        tied=head.tied,
        softcap=head.softcap is not None,
    )


def _module_sizes(layer: nn.Module, order: list[str]) -> tuple[tuple[int, ...], ...]:
    modules = dict(layer.named_modules())
    return tuple(tuple(p.numel() for p in modules[name].parameters(recurse=False)) for name in order)


def _forward_order(config: PreTrainedConfig) -> list[str]:
    """Return the names of a layer's modules that own parameters, in the order in which forward executes them."""
    model = _shallow_model(config, 1, "fp32", "sdpa")
    layer, order = model.get_decoder().layers[0], []
    for name, module in layer.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    _run_decoder(model, torch.empty(1, 4, config.hidden_size, device="meta"))
    return order


@dataclass(frozen=True)
class Activations:
    """Activation bytes of one micro-batch on one rank, without weights and their gradients.

    Attributes:
        layer: bytes saved for backward by one decoder layer.
        outer: bytes saved outside the layers, including attention masks and rotary embeddings.
        forward: peak temporary memory in the forward pass of one layer.
        backward: peak in the backward pass of one layer, in addition to what forward saved.
        elementwise: bytes read and written by all operations of one layer except matrix products, forward and backward.
        hidden: bytes of one [B, N, d] tensor, which a checkpointed layer saves.
    """

    layer: int
    outer: int
    forward: int
    backward: int
    elementwise: int
    hidden: int

    def saved(self, layers: int, checkpointing: bool) -> int:
        """Return the activation bytes at the start of the loss."""
        return self.outer + layers * (self.hidden if checkpointing else self.layer)

    def peak(self, layers: int, checkpointing: bool) -> int:
        """Return the peak activation bytes of the layers' forward and backward passes."""
        recomputed = self.layer - self.hidden if checkpointing else 0
        return self.saved(layers, checkpointing) + max(recomputed + self.backward, self.forward)


_TRACED: dict[tuple[str, int, int, str, str, int], Activations] = {}


def trace_activations(
    config: PreTrainedConfig, rows: int, tokens: int, precision: str, attention: str, parts: int = 1
) -> Activations:
    """Trace the activations of a [rows, tokens] micro-batch. Results are cached.

    Args:
        attention: the attention implementation, or "sdpa_shared" for sdpa kernels that do not copy the mask.
        parts: number of ranks that share the rows. Each has `tokens` tokens of a row.
    """
    key = (config.to_json_string(use_diff=False), rows, tokens, precision, attention, parts)
    if key not in _TRACED:
        exchange = None
        if parts > 1:
            exchange, rows, tokens = TracedExchange(parts), 1, rows * tokens  # rows are concatenated
        _TRACED[key] = _compare_depths(config, rows, tokens, precision, attention, exchange)
    return _TRACED[key]


def _compare_depths(
    config: PreTrainedConfig, rows: int, tokens: int, precision: str, attention: str, exchange: TracedExchange | None
) -> Activations:
    """Trace models with one and two layers. The difference is the contribution of one layer."""
    one, two = (_trace(config, layers, rows, tokens, precision, attention, exchange) for layers in (1, 2))
    layer = two.saved - one.saved
    # All layers share one bool mask for the micro-batch. Each sdpa call may convert it to its own float mask.
    mask = rows * tokens * tokens if attention in MASKED_ATTENTION else 0
    return Activations(
        layer=layer,
        outer=one.saved - layer + mask,
        forward=one.forward_peak - one.saved,
        backward=one.backward_peak - one.saved,
        elementwise=two.elementwise - one.elementwise,
        hidden=rows * tokens * config.hidden_size * DTYPES[precision].itemsize,
    )


@dataclass(frozen=True)
class _Trace:
    """Memory and memory traffic of one forward and backward pass of a shallow model, in bytes.

    Attributes:
        saved: activations kept for the backward pass.
        forward_peak: largest memory in use during the forward pass.
        backward_peak: largest memory in use during the backward pass.
        elementwise: bytes that elementwise operations read and write.
    """

    saved: int
    forward_peak: int
    backward_peak: int
    elementwise: int


def _trace(
    config: PreTrainedConfig,
    layers: int,
    rows: int,
    tokens: int,
    precision: str,
    attention: str,
    exchange: TracedExchange | None,
) -> _Trace:
    """Run a model with `layers` layers forward and backward on the meta device."""
    model = _shallow_model(config, layers, precision, attention)
    # DeepSpeed takes over the gradients of a leaf module after its backward, and other gradients at once.
    in_layers = set()
    for layer in model.get_decoder().layers:
        layer.register_full_backward_hook(lambda layer, *_: layer.zero_grad(set_to_none=True))
        in_layers |= set(layer.parameters())
    for parameter in set(model.parameters()) - in_layers:
        parameter.register_post_accumulate_grad_hook(_drop_grad)
    dtype = DTYPES[precision]
    with StorageTracker() as tracker:
        embeddings = torch.empty(rows, tokens, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        hidden = _run_decoder(model, embeddings, exchange)
        saved, forward_peak = tracker.live_bytes(), tracker.peak
        tracker.peak = 0
        grad = torch.empty_like(hidden)
        torch.autograd.backward(hidden, grad)
    return _Trace(saved, forward_peak, tracker.peak, tracker.elementwise)


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


def _shallow_model(config: PreTrainedConfig, layers: int, precision: str, attention: str) -> PreTrainedModel:
    """Build the model on the meta device with few layers, a tiny vocabulary and the replaced attention."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = layers, 8
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    config._attn_implementation = MASKED_ATTENTION.get(attention, VARIABLE_LENGTH)
    config.dtype = DTYPES[precision]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision]).train()


def _run_decoder(model: PreTrainedModel, embeddings: Tensor, exchange: TracedExchange | None = None) -> Tensor:
    positions = torch.empty(embeddings.shape[:2], dtype=torch.int64, device="meta")
    shared = {} if exchange is None else {"head_exchange": exchange}
    return model.get_decoder()(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **shared)[0]

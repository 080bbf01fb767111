"""Activations of a decoder layer, traced on the meta device.

The decoder runs forward and backward without data, and all live storages are counted. The numbers therefore follow the
code in transformers for every model family. Only attention is replaced, by a function that allocates the same tensors
as the kernels of the attention implementation.

Shape letters: B rows, N tokens of a row, H heads, D head size, d hidden size.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.config.settings import AdapterSettings
from pipeline.models.adapters import adapted_meta_model
from pipeline.models.loading import DTYPES
from pipeline.plan.storage_tracker import StorageTracker
from pipeline.plan.traced_attention import MASKED_ATTENTION, VARIABLE_LENGTH, TracedExchange

NO_ADAPTER = AdapterSettings()


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


_TRACED: dict[tuple[str, int, int, str, str, int, AdapterSettings], Activations] = {}


def trace_activations(
    config: PreTrainedConfig,
    rows: int,
    tokens: int,
    precision: str,
    attention: str,
    parts: int = 1,
    adapter: AdapterSettings = NO_ADAPTER,
) -> Activations:
    """Trace the activations of a [rows, tokens] micro-batch. Results are cached.

    Args:
        attention: the attention implementation, or "sdpa_shared" for sdpa kernels that do not copy the mask.
        parts: number of ranks that share the rows. Each has `tokens` tokens of a row.
        adapter: adapter settings; `r` is None for full fine-tuning.
    """
    key = (config.to_json_string(use_diff=False), rows, tokens, precision, attention, parts, adapter)
    if key not in _TRACED:
        exchange = None
        if parts > 1:
            exchange, rows, tokens = TracedExchange(parts), 1, rows * tokens  # rows are concatenated
        models = [shallow_model(config, layers, precision, attention, adapter) for layers in (1, 2)]
        _TRACED[key] = _compare_depths(models, rows, tokens, precision, attention, exchange)
    return _TRACED[key]


def _compare_depths(
    models: list[PreTrainedModel],
    rows: int,
    tokens: int,
    precision: str,
    attention: str,
    exchange: TracedExchange | None,
) -> Activations:
    """Trace models with one and two layers. The difference is the contribution of one layer."""
    one, two = (_trace(model, rows, tokens, precision, exchange) for model in models)
    layer = two.saved - one.saved
    # All layers share one bool mask for the micro-batch. Each sdpa call may convert it to its own float mask.
    mask = rows * tokens * tokens if attention in MASKED_ATTENTION else 0
    return Activations(
        layer=layer,
        outer=one.saved - layer + mask,
        forward=one.forward_peak - one.saved,
        backward=one.backward_peak - one.saved,
        elementwise=two.elementwise - one.elementwise,
        hidden=rows * tokens * models[0].config.hidden_size * DTYPES[precision].itemsize,
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


def _trace(model: PreTrainedModel, rows: int, tokens: int, precision: str, exchange: TracedExchange | None) -> _Trace:
    """Run a shallow model forward and backward on the meta device."""
    # DeepSpeed takes over the gradients of a leaf module after its backward, and other gradients at once.
    in_layers = set()
    for layer in model.get_decoder().layers:
        layer.register_full_backward_hook(lambda layer, *_: layer.zero_grad(set_to_none=True))
        in_layers |= set(layer.parameters())
    for parameter in {p for p in model.parameters() if p.requires_grad} - in_layers:
        parameter.register_post_accumulate_grad_hook(_drop_grad)
    dtype = DTYPES[precision]
    with StorageTracker() as tracker:
        embeddings = torch.empty(rows, tokens, model.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        hidden = run_decoder(model, embeddings, exchange)
        saved, forward_peak = tracker.live_bytes(), tracker.peak
        tracker.peak = 0
        grad = torch.empty_like(hidden)
        torch.autograd.backward(hidden, grad)
    return _Trace(saved, forward_peak, tracker.peak, tracker.elementwise)


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


def shallow_model(
    config: PreTrainedConfig, layers: int, precision: str, attention: str, adapter: AdapterSettings
) -> PreTrainedModel:
    """Build the model on the meta device with few layers, a tiny vocabulary and the replaced attention."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = layers, 8
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    config._attn_implementation = MASKED_ATTENTION.get(attention, VARIABLE_LENGTH)
    config.dtype = DTYPES[precision]
    return adapted_meta_model(config, adapter).train()


def run_decoder(model: PreTrainedModel, embeddings: Tensor, exchange: TracedExchange | None = None) -> Tensor:
    """Run the decoder without data, on rows that other ranks share if there is an exchange."""
    positions = torch.empty(embeddings.shape[:2], dtype=torch.int64, device="meta")
    shared = {} if exchange is None else {"head_exchange": exchange}
    return model.get_decoder()(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **shared)[0]

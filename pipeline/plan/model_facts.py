"""What a model holds: its parameters by module, and what autograd keeps of one layer, traced on the meta device.

The decoder runs forward and backward without data, and every storage that it allocates is counted while it lives. So
the figures are those of transformers' own code, whatever the family. Attention alone is a stand-in that allocates
what the kernels behind `attn_implementation` do.

Shape letters: B rows, N tokens of a row, H heads, D head size, d hidden size.
"""

import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.loading import DTYPES, meta_model

PLANNED = "planned"
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, in elements.

    Attributes:
        config: with the padded vocabulary.
        layers: modules of each decoder layer in forward order, as tuples of their parameters' sizes.
        final: those of the modules after the last layer.
        vocabulary: rows x d of the input embedding, and of the head and its bias where they are not tied.
        matrices: of all parameters, those that are no vectors (an optimizer group of their own).
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
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab(self) -> int:
        return int(self.config.vocab_size)

    @cached_property
    def decoder(self) -> int:
        """Parameters outside the vocabulary."""
        return sum(sum(module) for layer in (*self.layers, self.final) for module in layer)

    @cached_property
    def parameters(self) -> int:
        return self.decoder + sum(self.vocabulary)

    @cached_property
    def decoder_matrices(self) -> int:
        """Elements of the decoder's matrices: what a token is multiplied with."""
        return sum(self.matrices) - sum(n for n in self.vocabulary if n >= self.hidden * self.vocab)


def model_facts(config: PreTrainedConfig) -> ModelFacts:
    """Read off the model's shapes on the meta device; `config.vocab_size` is the padded one."""
    model = meta_model(config)
    decoder = model.get_decoder()
    ends = [vocabulary_parameter(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    facts = head_config(model)
    vocabulary = ends[:1] if facts.tied else ends
    if facts.bias is not None:
        vocabulary = [*vocabulary, facts.bias]
    order = _forward_order(config)
    layers = tuple(_sizes(layer, order) for layer in decoder.layers)
    inner = {id(p) for layer in decoder.layers for p in layer.parameters()} | {id(p) for p in vocabulary}
    final = tuple(
        tuple(p.numel() for p in module.parameters(recurse=False))
        for module in decoder.modules()
        if any(id(p) not in inner for p in module.parameters(recurse=False))
    )
    parameters = list(model.parameters())
    return ModelFacts(
        config=config,
        layers=layers,
        final=final,
        vocabulary=tuple(p.numel() for p in vocabulary),
        matrices=tuple(p.numel() for p in parameters if p.dim() > 1),
        vectors=tuple(p.numel() for p in parameters if p.dim() == 1),
        tied=facts.tied,
        softcap=facts.softcap is not None,
    )


def _sizes(layer: nn.Module, order: list[str]) -> tuple[tuple[int, ...], ...]:
    modules = dict(layer.named_modules())
    return tuple(tuple(p.numel() for p in modules[name].parameters(recurse=False)) for name in order)


def _forward_order(config: PreTrainedConfig) -> list[str]:
    """Names of a layer's modules that have parameters of their own, as forward comes to them."""
    model = _shallow(config, 1, "fp32", "sdpa")
    layer, order = model.get_decoder().layers[0], []
    for name, module in layer.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    _decode(model, torch.empty(1, 4, config.hidden_size, device="meta"))
    return order


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, beside weights and their gradients.

    Attributes:
        layer: kept for backward by one decoder layer. outer: kept outside the layers, masks and rotations included.
        forward: allocated and freed again within one layer's forward pass, at its peak.
        backward: the same of its backward pass, which frees what forward kept as it goes.
        moved: bytes read and written by one layer's operations other than matrix products, forward and backward.
        hidden: of one [B, N, d] tensor, what a checkpointed layer keeps.
    """

    layer: int
    outer: int
    forward: int
    backward: int
    moved: int
    hidden: int

    def kept(self, layers: int, checkpointing: bool) -> int:
        """When the loss begins."""
        return self.outer + layers * (self.hidden if checkpointing else self.layer)

    def peak(self, layers: int, checkpointing: bool) -> int:
        """At the worst moment of the layers' forward and backward passes."""
        recomputed = self.layer - self.hidden if checkpointing else 0
        return self.kept(layers, checkpointing) + max(recomputed + self.backward, self.forward)


@lru_cache(maxsize=256)
def _traced(key: str, rows: int, tokens: int, precision: str, attention: str) -> Activations:
    config = _CONFIGS[key]
    one, two = (_trace(config, layers, rows, tokens, precision, attention) for layers in (1, 2))
    size = DTYPES[precision].itemsize
    kept, peak_forward, peak_backward, moved = one
    layer = two[0] - kept
    # A bool mask of the whole micro-batch, made once; each sdpa call turns it into numbers of its own.
    mask = rows * tokens * tokens if attention != "flash_attention_2" else 0
    return Activations(
        layer=layer,
        outer=kept - layer + mask,
        forward=peak_forward - kept,
        backward=peak_backward - kept,
        moved=two[3] - moved,
        hidden=rows * tokens * config.hidden_size * size,
    )


_CONFIGS: dict[str, PreTrainedConfig] = {}


def activations(config: PreTrainedConfig, rows: int, tokens: int, precision: str, attention: str) -> Activations:
    """Of `rows` x `tokens` tokens. attention: as `attn_implementation`, or sdpa_shared: no copies of the mask."""
    key = config.to_json_string(use_diff=False)
    _CONFIGS[key] = config
    return _traced(key, rows, tokens, precision, attention)


class Live(TorchDispatchMode):
    """Bytes of all storages that were allocated inside and still live; `peak` is their greatest sum.

    `moved`: bytes that operations other than matrix products read and wrote, views left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.moved = 0

    def now(self) -> int:
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        return sum(size for _, size in self._held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        writes = func._schema.is_mutable or any(t.untyped_storage()._cdata not in given for t in made)
        if writes and func.overloadpacket not in PRODUCTS:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in inputs + made)
        return result


def _shallow(config: PreTrainedConfig, layers: int, precision: str, attention: str) -> PreTrainedModel:
    """The same model with few layers and no vocabulary, on the meta device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = layers, 8
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    config._attn_implementation = PLANNED
    config.dtype = DTYPES[precision]
    _ATTENTION.append(attention)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision]).train()


def _decode(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    positions = torch.empty(embeddings.shape[:2], dtype=torch.int64, device="meta")
    return model.get_decoder()(inputs_embeds=embeddings, position_ids=positions, use_cache=False)[0]


def _trace(
    config: PreTrainedConfig, layers: int, rows: int, tokens: int, precision: str, attention: str
) -> tuple[int, int, int, int]:
    """Bytes kept after forward, peaks of forward and backward, bytes moved; of a model with that many layers."""
    model = _shallow(config, layers, precision, attention)
    for parameter in model.parameters():
        # DeepSpeed takes each gradient away as soon as it is there.
        parameter.register_post_accumulate_grad_hook(_drop)
    dtype = DTYPES[precision]
    with Live() as live:
        embeddings = torch.empty(rows, tokens, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        hidden = _decode(model, embeddings)
        kept, forward = live.now(), live.peak
        live.peak = 0
        grad = torch.empty_like(hidden)
        torch.autograd.backward(hidden, grad)
    return kept, forward, live.peak, live.moved


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


_ATTENTION: list[str] = []


class _Kernel(torch.autograd.Function):
    """Allocates what a fused attention kernel does: output and log-sum-exps, then the three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
    """In the place of transformers' attention functions; [B, H, N, D] in, [B, N, H, D] out."""
    kind, groups = _ATTENTION[-1], query.shape[1] // key.shape[1]
    batch, tokens = query.shape[0], query.shape[2]
    if kind != "flash_attention_2" and groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if kind == "eager":
        scores = query @ key.transpose(2, 3) * 1.0
        scores = scores + query.new_empty(batch, 1, tokens, tokens)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), None
    mask = query.new_empty(batch, 1, tokens, tokens) if kind == "sdpa" else None  # not with "sdpa_shared"
    return _Kernel.apply(query, key, value, mask).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLANNED, _attention)

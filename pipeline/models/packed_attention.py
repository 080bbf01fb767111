"""Attention over packed sequences, registered with transformers as `solar_packed`.

Each sequence attends only to itself. No mask over the row is built, and no scores between sequences are computed. In
half precision on a GPU, torch's variable-length kernel reads the sequence boundaries. Elsewhere, sequences of similar
length form a batch for `scaled_dot_product_attention`.

Shape letters: T tokens of a micro-batch, P tokens of all groups, S sequences of a group, L tokens of its longest
sequence, H query heads, K key-value heads, D head size.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from pipeline.common.errors import UserError
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss.indexing import upload
from pipeline.models.sequence_parallel import HeadExchange

PACKED = "solar_packed"
MASKED = ("sdpa", "eager")  # these separate the sequences of a row by a mask
KNOWN = (PACKED, *MASKED, "flash_attention_2")

# Two sequences of different length share a group while the padding costs less than another call. The bounds are in
# scores per head: absolute (about the cost of a call on a CPU core), and relative to the group.
CALL_SCORES = 64**2
PADDING_FRACTION = 1 / 8


def resolve_attention(requested: str | None, config: PreTrainedConfig) -> str:
    """Return the attention implementation of a model.

    Args:
        requested: `model.attn_implementation` of the recipe. None selects `solar_packed`, or another implementation if
            the model caps its attention scores (eager) or drops them out in training (sdpa).
        config: the model's configuration.

    Raises:
        UserError: the name is unknown, or `solar_packed` is requested for a model that it does not support.
    """
    if requested is not None and requested not in KNOWN and "/" not in requested:
        raise UserError(
            f"model.attn_implementation {requested!r} is unknown; use {', '.join(KNOWN)}, or a kernel from the Hub "
            "such as kernels-community/flash-attn2"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        other, reason = "eager", "caps its attention scores (attn_logit_softcapping)"
    elif getattr(config, "attention_dropout", 0.0):
        other, reason = "sdpa", "drops out attention weights (attention_dropout)"
    else:
        return requested or PACKED
    if requested == PACKED:
        raise UserError(f"model.attn_implementation {PACKED!r}: {config.model_type} {reason}; use {other!r}")
    return requested or other


def sequence_arguments(batch: MicroBatch, implementation: str) -> dict[str, Any]:
    """Return the keyword arguments that tell attention the sequence boundaries of a flattened micro-batch.

    The names are those of transformers. With all four, its flash attention does not derive them in each layer, which
    would synchronize the device.
    """
    longest = max(batch.seq_lens)
    arguments: dict[str, Any] = {
        "cu_seq_lens_q": batch.cu_seq_lens,
        "cu_seq_lens_k": batch.cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if implementation == PACKED:
        arguments["sequence_groups"] = SequenceGroups(batch.seq_lens, batch.cu_seq_lens.device)
    return arguments


class SequenceGroups:
    """Sequences of a micro-batch, grouped by length and padded to the longest of their group.

    Args:
        lengths: number of tokens of each sequence, in order.
        device: device of the index tensors.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = lengths, device

    @cached_property
    def members(self) -> list[list[int]]:
        """Sequences of each group, longest first."""
        lengths = self.lengths
        groups: list[list[int]] = []
        padding = scores = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            own = lengths[i] ** 2
            if groups:
                more = lengths[groups[-1][0]] ** 2 - own
                if padding + more <= max(CALL_SCORES, PADDING_FRACTION * (scores + own)):
                    groups[-1].append(i)
                    padding, scores = padding + more, scores + own
                    continue
            groups.append([i])
            padding, scores = 0, own
        return groups

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(S, L) of each group."""
        return [(len(group), self.lengths[group[0]]) for group in self.members]

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Index tensors, or None if the groups are the tokens in their order.

        They are: [P] the token at each place of the groups, [T] the place of each token, and the places of padding.
        """
        lengths = np.asarray(self.lengths)
        starts = np.cumsum(lengths) - lengths
        tokens, is_padding = [], []
        for group, (_, longest) in zip(self.members, self.shapes, strict=True):
            columns = np.arange(longest)
            beyond = columns >= lengths[group][:, None]
            tokens.append(np.where(beyond, 0, starts[group][:, None] + columns).ravel())
            is_padding.append(beyond.ravel())
        token, padding = np.concatenate(tokens), np.concatenate(is_padding)
        if np.array_equal(token, np.arange(lengths.sum())):
            return None
        place = np.empty(lengths.sum(), np.int64)
        place[token[~padding]] = np.flatnonzero(~padding)
        on_host = [torch.from_numpy(part) for part in (token, place, np.flatnonzero(padding))]
        tokens_at, places, padding_at = upload(on_host, self.device)
        return tokens_at, places, padding_at

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Distribute [T, H, D] tokens to the groups, each [S, H, L, D] with zeros as padding."""
        if self.indices is not None:
            token, place, padding = self.indices
            tokens = _Gather.apply(tokens, token, padding, place, padding[:0])
        parts = tokens.split([count * longest for count, longest in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, groups: list[Tensor]) -> Tensor:
        """Return the [T, H, D] tokens of all groups, each [S, H, L, D], without padding."""
        parts = [group.transpose(1, 2).flatten(0, 1) for group in groups]
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.indices is None:
            return tokens
        token, place, padding = self.indices
        return _Gather.apply(tokens, place, padding[:0], token, padding)


class _Gather(torch.autograd.Function):
    """Rows of a tensor by index, with zeros at some places.

    The caller gives the index of the backward pass too. No row is used twice outside the zeros, so the gradient is a
    gather as well, which is much faster on a CPU than the scatter of `index_select`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, zeros: Tensor, grad_index: Tensor, grad_zeros: Tensor) -> Tensor:
        ctx.save_for_backward(grad_index, grad_zeros)
        return x.index_select(0, index).index_fill_(0, zeros, 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, zeros = ctx.saved_tensors
        return grad_outputs[0].index_select(0, index).index_fill_(0, zeros, 0), None, None, None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequence_groups: SequenceGroups | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    head_exchange: HeadExchange | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence of a flattened micro-batch.

    The arguments are those of attention functions in transformers. Dropout is not supported (`resolve_attention`).

    Args:
        query: [1, H, T, D]. key, value: [1, K, T, D].
        attention_mask: not used; transformers builds none for this implementation.
        sliding_window: each token attends to this many tokens, including itself; None: to all before it.
        sequence_groups, cu_seq_lens_q, max_length_q: see `sequence_arguments`.
        head_exchange: if ranks share the rows, exchanges this rank's tokens for its heads of all tokens, and back.

    Returns:
        [1, T, H, D] output, and None for the attention weights.

    Raises:
        ValueError: the sequence boundaries are missing.
    """
    if sequence_groups is None or cu_seq_lens_q is None:
        raise ValueError(f"attention {PACKED!r} needs the sequence boundaries; use `decoder_hidden_states`")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if head_exchange is not None:
        q, k, v = head_exchange.to_heads(q, k, v)
    if _has_variable_length_kernel(query, value):
        unpadded, padding = v.shape[-1], q.shape[-1] - v.shape[-1]
        v = pad(v, (0, padding)) if padding else v  # the kernel requires equal head sizes
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        out = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)  # a tuple only if more outputs are requested
        out = out[..., :unpadded]
    else:
        parts = zip(*(sequence_groups.split(x) for x in (q, k, v)), strict=True)
        out = sequence_groups.join([_attend(*part, scaling=scaling, window=sliding_window) for part in parts])
    if head_exchange is not None:
        out = head_exchange.to_tokens(out)
    return out.unsqueeze(0), None


def _has_variable_length_kernel(query: Tensor, value: Tensor) -> bool:
    """Return whether flash attention in torch supports the tensors: half precision, Ampere or newer, head size."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_size = query.shape[-1]
    if value.shape[-1] > head_size:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and head_size % 8 == 0 and head_size <= 256


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
    """Compute causal attention of a group, [S, H, L, D]."""
    longest, mask = query.shape[2], None
    if window is not None and window < longest:
        mask = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(
        *(query, key, value, mask),
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


AttentionInterface.register(PACKED, packed_attention)

"""Attention on the meta device, which allocates the tensors of real attention, for `model_facts.py`.

Shape letters: B rows, N tokens of a row, H heads, D head size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pipeline.models.sequence_parallel import HeadExchange


class TracedExchange(HeadExchange):
    """Exchange between ranks that share rows, without the other ranks.

    Args:
        size: number of ranks that share the rows.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, None)
        self.splits_heads = True

    def _all_to_all(self, x: Tensor) -> Tensor:
        return x * 1.0  # allocates the received tensor, and the gradient in backward


class FusedKernel(torch.autograd.Function):
    """Stand-in that allocates the tensors of a fused attention kernel: output, log-sum-exp, three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exps = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exps, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    head_exchange: TracedExchange | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Replacement for an attention function in transformers: [B, H, N, D] in, [B, N, H, D] out."""
    if head_exchange is not None:
        tensors = head_exchange.to_heads(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)))
        out = FusedKernel.apply(*(x.transpose(0, 1)[None] for x in tensors), None).squeeze(0).transpose(0, 1)
        return head_exchange.to_tokens(out)[None], None
    groups = query.shape[1] // key.shape[1]
    batch, tokens = query.shape[0], query.shape[2]
    if kind != "variable_length" and groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if kind == "eager":
        scores = query @ key.transpose(2, 3) * 1.0
        scores = scores + query.new_empty(batch, 1, tokens, tokens)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), None
    mask = query.new_empty(batch, 1, tokens, tokens) if kind == "sdpa" else None
    return FusedKernel.apply(query, key, value, mask).transpose(1, 2).contiguous(), None


# transformers derives behavior from names that contain "flash" or "sdpa", so the registered names avoid them.
MASKED_ATTENTION = {
    "sdpa": "traced_copied_mask",
    "sdpa_shared": "traced_shared_mask",
    "eager": "traced_eager",
}
VARIABLE_LENGTH = "traced_variable_length"  # all other implementations read the sequence boundaries
for _kind, _name in {**MASKED_ATTENTION, "variable_length": VARIABLE_LENGTH}.items():
    AttentionInterface.register(_name, partial(_attention, _kind))

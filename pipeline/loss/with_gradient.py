"""Connect a gradient that was computed in the forward pass to autograd."""

from typing import Any

import torch
from torch import Tensor

from .softmax_state import accumulation_dtype


class WithGradient(torch.autograd.Function):
    """Identity on the loss whose backward adds the precomputed gradient grad_scale * grad of `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, grad: Tensor, grad_scale: float) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.grad_scale = grad_scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        # The factor may include a loss scale beyond the range of fp16, so multiply in at least fp32.
        factor = (grad_outputs[0] * ctx.grad_scale).to(accumulation_dtype(grad.dtype))
        return (grad * factor[None, None]).to(grad.dtype), grad_outputs[0], None, None

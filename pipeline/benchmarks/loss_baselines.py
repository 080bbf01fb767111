"""Variants compared by `pipeline.benchmarks.loss`: this loss, its alternatives, and a lower bound.

Each variant is a function of `LossInputs` that computes the gradients of the hidden states and of the tied [V, d]
matrix. Shape letters: T target tokens, V vocabulary, d hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.loss import LossBatch, LossNormalizers, LossSettings, Vocabulary, VocabularyShard, solar_loss
from pipeline.loss.kernels import add_product_, row_stride
from pipeline.loss.soft_tokens import soft_tokens
from pipeline.loss.softmax_state import accumulation_dtype


@dataclass(frozen=True)
class LossShape:
    """Sizes of the loss inputs. Sequences are pairs of pivot and translation.

    Attributes:
        tokens: T.
        vocab: V.
        hidden: d.
        sequence: number of target tokens per sequence.
    """

    tokens: int = 2048
    vocab: int = 32768
    hidden: int = 512
    sequence: int = 128

    @property
    def flops(self) -> float:
        """FLOPs of three matrix products."""
        return 6.0 * self.tokens * self.vocab * self.hidden


@dataclass
class LossInputs:
    """Inputs of the loss, and buffers that are reused across calls.

    Attributes:
        hidden: [T, d] hidden states; require a gradient.
        weight: [V, d] tied matrix of head and input embedding; requires a gradient.
        targets, targets_on_host: [T] token ids on the device and on the CPU.
        accumulator: [V, d] gradient buffer.
        logits: [T, V] buffer of the lower bound.
    """

    shape: LossShape
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    targets_on_host: Tensor
    settings: LossSettings = field(default_factory=LossSettings)
    accumulator: Tensor | None = None
    logits: Tensor | None = None

    @classmethod
    def random(
        cls, shape: LossShape, dtype: torch.dtype, device: str, settings: LossSettings | None = None
    ) -> "LossInputs":
        """Draw inputs from a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)
        # Logits with standard deviation 2 are neither flat nor one-hot.
        hidden = torch.randn(shape.tokens, shape.hidden, generator=generator, device=device)
        weight = torch.randn(shape.vocab, shape.hidden, generator=generator, device=device) * (2 / shape.hidden**0.5)
        targets = torch.randint(0, shape.vocab, (shape.tokens,), generator=generator, device=device)
        return cls(
            shape,
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(),
            targets,
            targets.cpu(),
            settings or LossSettings(),
        )

    def zeroed_accumulator(self) -> Tensor:
        """Return the [V, d] gradient buffer, zeroed. The training loop also reuses its buffer in each step."""
        if self.accumulator is None:
            return torch.zeros_like(self.weight, dtype=accumulation_dtype(self.weight.dtype), requires_grad=False)
        return self.accumulator.zero_()

    def clear_grads(self) -> None:
        """Drop the gradients, as a training loop does between steps."""
        self.hidden.grad = self.weight.grad = None


LossVariant = Callable[[LossInputs], None]


def _solar(inputs: LossInputs, alignment_weight: float, settings: LossSettings) -> None:
    shape = inputs.shape
    count = shape.tokens // shape.sequence
    sequences = torch.arange(count)
    loss_batch = LossBatch(
        targets=inputs.targets_on_host,
        lengths=torch.full((count,), shape.sequence),
        pivot=sequences // 2 * 2 if alignment_weight else sequences,
        problem_id=sequences // 2,
        language=sequences % 2,
    )
    inputs.accumulator = inputs.zeroed_accumulator()
    shard = VocabularyShard(inputs.weight.detach(), 0, inputs.accumulator)
    vocabulary = Vocabulary(shape.vocab, shard, shard)
    normalizers = LossNormalizers(float(shape.tokens), count / 2 if alignment_weight else 0.0)
    result = solar_loss(inputs.hidden, loss_batch, vocabulary, settings, alignment_weight, normalizers, 2)
    result.loss.backward()


def solar(inputs: LossInputs) -> None:
    """Compute cross entropy and alignment with this project's loss."""
    _solar(inputs, 1.0, inputs.settings)


def solar_full_mixture(inputs: LossInputs) -> None:
    """Compute cross entropy and alignment with this project's loss, with soft tokens over the whole vocabulary."""
    _solar(inputs, 1.0, replace(inputs.settings, top_k=None))


def solar_ce(inputs: LossInputs) -> None:
    """Compute cross entropy only, with this project's loss: no pairs, no soft tokens."""
    _solar(inputs, 0.0, inputs.settings)


def plain(inputs: LossInputs) -> None:
    """Compute cross entropy and alignment of soft tokens over the whole vocabulary by autograd over full logits."""
    logits = inputs.hidden @ inputs.weight.T
    loss = F.cross_entropy(logits, inputs.targets)
    soft = soft_tokens(logits, inputs.weight, inputs.settings.softmax_temperature)
    pooled = soft.view(-1, inputs.shape.sequence, inputs.shape.hidden).mean(1)
    loss = loss + (1 - F.cosine_similarity(pooled[1::2], pooled[::2].detach(), dim=1)).mean()
    loss.backward()


def plain_ce(inputs: LossInputs) -> None:
    """Compute cross entropy only, by autograd over full logits."""
    F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets).backward()


def torch_chunked_ce(inputs: LossInputs) -> None:
    """Compute cross entropy only, with torch's chunked linear_cross_entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, options=options).backward()


def deepspeed_chunked_ce(inputs: LossInputs) -> None:
    """Compute cross entropy only, with DeepSpeed's row-chunked function over full logits."""
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    chunked_cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets).backward()


def liger_ce(inputs: LossInputs) -> None:
    """Compute cross entropy only, with Liger-Kernel."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    LigerFusedLinearCrossEntropyFunction.apply(inputs.hidden, inputs.weight, inputs.targets)[0].backward()


def cce(inputs: LossInputs) -> None:
    """Compute cross entropy only, with Apple's cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets).backward()


def three_products(inputs: LossInputs) -> None:
    """Compute only the lower bound: the products z = H W^T, dH = dz W, and dW = dz^T H into fp32."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    if inputs.logits is None:
        stride = row_stride(inputs.shape.vocab, hidden.is_cuda)
        inputs.logits = hidden.new_empty(inputs.shape.tokens, stride)[:, : inputs.shape.vocab]
        inputs.accumulator = inputs.zeroed_accumulator()
    assert inputs.accumulator is not None
    torch.mm(hidden, weight.T, out=inputs.logits)
    inputs.logits @ weight
    add_product_(inputs.accumulator, inputs.logits.T, hidden, 1.0)


def loss_variants(device: str) -> dict[str, LossVariant]:
    """Return the variants that are installed and run on the device, by name, starting with this project's loss."""
    variants: dict[str, LossVariant] = {
        "solar": solar,
        "solar full mixture": solar_full_mixture,
        "solar CE": solar_ce,
        "three products": three_products,
        "plain": plain,
        "plain CE": plain_ce,
    }
    if hasattr(F, "linear_cross_entropy"):
        variants["torch chunked CE"] = torch_chunked_ce
    if find_spec("deepspeed"):
        variants["DeepSpeed chunked CE"] = deepspeed_chunked_ce
    if device == "cuda" and find_spec("liger_kernel"):
        variants["Liger CE"] = liger_ce
    if device == "cuda" and find_spec("cut_cross_entropy"):
        variants["CCE"] = cce
    return variants

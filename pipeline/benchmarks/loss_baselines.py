"""The contestants of `pipeline.benchmarks.loss`: this loss, what a user would write otherwise, and the floor.

Each is a function of a `Problem` that leaves the gradients of hidden states and of the tied [V, d] matrix behind.
Shape letters: T supervised positions, V vocabulary, d hidden size, n sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.loss import LossBatch, LossNormalizers, LossSettings, Vocabulary, VocabularyShard, solar_loss
from pipeline.loss.soft_tokens import soft_tokens
from pipeline.loss.softmax import accumulation_dtype, add_product_


@dataclass(frozen=True)
class Shape:
    """T, V, d and the length of the sequences, which come in pairs of pivot and translation."""

    tokens: int = 2048
    vocab: int = 32768
    hidden: int = 512
    sequence: int = 128

    @property
    def flops(self) -> float:
        """Of three matrix products."""
        return 6.0 * self.tokens * self.vocab * self.hidden


@dataclass
class Problem:
    """hidden [T, d] and the tied weight [V, d] with their gradients, targets [T] twice, buffers for the floor."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    targets_on_host: Tensor
    settings: LossSettings = field(default_factory=LossSettings)
    accumulator: Tensor | None = None
    logits: Tensor | None = None

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: str, settings: LossSettings | None = None) -> "Problem":
        generator = torch.Generator(device).manual_seed(0)
        # Logits of standard deviation 2: neither flat nor one-hot.
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

    def accumulated(self) -> Tensor:
        """[V, d] zeros in fp32 or wider, kept from step to step as the training loop does."""
        if self.accumulator is None:
            return torch.zeros_like(self.weight, dtype=accumulation_dtype(self.weight.dtype), requires_grad=False)
        return self.accumulator.zero_()

    def forget(self) -> None:
        """What a training loop drops between steps."""
        self.hidden.grad = self.weight.grad = None


def _solar(problem: Problem, weight: float) -> None:
    shape = problem.shape
    count = shape.tokens // shape.sequence
    number = torch.arange(count)
    loss_batch = LossBatch(
        targets=problem.targets_on_host,
        lengths=torch.full((count,), shape.sequence),
        pivot=number // 2 * 2 if weight else number,
        problem_id=number // 2,
        language=number % 2,
    )
    problem.accumulator = problem.accumulated()
    shard = VocabularyShard(problem.weight.detach(), 0, problem.accumulator)
    normalizers = LossNormalizers(float(shape.tokens), count / 2 if weight else 0.0)
    result = solar_loss(
        problem.hidden, loss_batch, Vocabulary(shape.vocab, shard, shard), problem.settings, weight, normalizers, 2
    )
    result.loss.backward()


def solar(problem: Problem) -> None:
    """Cross entropy and alignment, this project's way."""
    _solar(problem, 1.0)


def solar_ce(problem: Problem) -> None:
    """The same without pairs: cross entropy alone, no soft tokens."""
    _solar(problem, 0.0)


def plain(problem: Problem) -> None:
    """Cross entropy and soft tokens through autograd."""
    logits = problem.hidden @ problem.weight.T
    loss = F.cross_entropy(logits, problem.targets)
    soft = soft_tokens(logits, problem.weight)
    u = soft.view(-1, problem.shape.sequence, problem.shape.hidden).mean(1)
    loss = loss + (1 - F.cosine_similarity(u[1::2], u[::2].detach(), dim=1)).mean()
    loss.backward()


def plain_ce(problem: Problem) -> None:
    """Cross entropy alone through autograd."""
    F.cross_entropy(problem.hidden @ problem.weight.T, problem.targets).backward()


def torch_chunked_ce(problem: Problem) -> None:
    """Cross entropy alone by torch's chunked linear_cross_entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, options=options).backward()


def deepspeed_chunked_ce(problem: Problem) -> None:
    """Cross entropy alone by DeepSpeed's row-blocked function on full logits."""
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    chunked_cross_entropy(problem.hidden @ problem.weight.T, problem.targets).backward()


def liger_ce(problem: Problem) -> None:
    """Cross entropy alone by Liger-Kernel."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    LigerFusedLinearCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.targets)[0].backward()


def cce(problem: Problem) -> None:
    """Cross entropy alone by Apple's cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    linear_cross_entropy(problem.hidden, problem.weight, problem.targets).backward()


def three_products(problem: Problem) -> None:
    """The floor: z = H W^T, dH = dz W, dW = dz^T H into fp32, whole and nothing else."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    if problem.logits is None:
        problem.logits = hidden.new_empty(problem.shape.tokens, problem.shape.vocab)
        problem.accumulator = problem.accumulated()
    assert problem.accumulator is not None
    torch.mm(hidden, weight.T, out=problem.logits)
    problem.logits @ weight
    add_product_(problem.accumulator, problem.logits.T, hidden, 1.0)


def contestants(device: str) -> dict[str, Callable[[Problem], None]]:
    """By name, those that run here; this loss first."""
    found: dict[str, Callable[[Problem], None]] = {
        "solar": solar,
        "solar CE": solar_ce,
        "three products": three_products,
    }
    found |= {"plain": plain, "plain CE": plain_ce}
    if hasattr(F, "linear_cross_entropy"):
        found["torch chunked CE"] = torch_chunked_ce
    if find_spec("deepspeed"):
        found["DeepSpeed chunked CE"] = deepspeed_chunked_ce
    if device == "cuda" and find_spec("liger_kernel"):
        found["Liger CE"] = liger_ce
    if device == "cuda" and find_spec("cut_cross_entropy"):
        found["CCE"] = cce
    return found

"""Settings of the SOLAR loss; docs/method.md says which come from the paper and which are our choice."""

from dataclasses import dataclass
from typing import Literal

Distance = Literal["cosine", "mse", "infonce"]
Pooling = Literal["mean", "last", "weights"]
Head = Literal["auto", "vocab_parallel", "gathered"]
Detach = Literal["pivot", "embeddings", "probabilities"]


@dataclass(frozen=True)
class LossSettings:
    """How soft tokens are pooled and compared. The defaults are the literal reading of the method.

    The paper calls a sequence's pooled representation its soft-token summary.

    Attributes:
        alignment_weight: factor of the alignment term; 0 is plain supervised fine-tuning, bit for bit.
        alignment_warmup_ratio: fraction of the optimizer steps over which that factor rises linearly from 0.
        distance: distance of a pooled representation from its pivot's: 1 - cosine, mean squared difference, or
            InfoNCE on cosines.
        infonce_temperature: divisor of the cosines in InfoNCE.
        softmax_temperature: divisor of the logits in the soft tokens' softmax (never in the cross entropy).
        pooling: how soft tokens are pooled: mean over the response, its last position, or given weights per token.
        detach: what gets no alignment gradient: the pivots' pooled representations, the embeddings E, or the
            probabilities p.
        centring: subtract each language's running mean from its pooled representations before comparing them.
        centring_momentum: fraction of the old running mean kept at each micro-step.
        vocabulary_weights: safetensors file with a tensor `weights` [V] that scales each vocabulary entry's
            part in the soft tokens; null means 1 for all.
        token_weights: safetensors file with a tensor `weights` [V]; with pooling `weights`, a position is weighted
            by its target token.
        head: what the ranks exchange: hidden states and their gradients (`vocab_parallel`), or shards of the head
            and its gradient on a ring (`gathered`); `auto` selects the one with less traffic. The results are equal
            up to rounding.
        memory_budget_mb: size of the buffer for one chunk's logits on each rank, in MiB; null: 64 on a CPU, 2048 on
            a GPU, where larger matrix products are faster.
    """

    alignment_weight: float = 1.0
    alignment_warmup_ratio: float = 0.1
    distance: Distance = "cosine"
    infonce_temperature: float = 0.1
    softmax_temperature: float = 1.0
    pooling: Pooling = "mean"
    detach: tuple[Detach, ...] = ("pivot",)
    centring: bool = False
    centring_momentum: float = 0.9
    vocabulary_weights: str | None = None
    token_weights: str | None = None
    head: Head = "auto"
    memory_budget_mb: float | None = None

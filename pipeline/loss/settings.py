"""The settings of the SOLAR loss; docs/method.md says which come from the paper and which are our choice."""

from dataclasses import dataclass
from typing import Literal

Distance = Literal["cosine", "mse", "infonce"]
Pooling = Literal["mean", "last", "weights"]
Head = Literal["auto", "vocab_parallel", "gathered"]
Detach = Literal["pivot", "embeddings", "probabilities"]


@dataclass(frozen=True)
class LossSettings:
    """How summaries are made and compared. The defaults are the literal reading of the method.

    Attributes:
        alignment_weight: factor of the alignment term; 0 is plain supervised fine-tuning, bit for bit.
        alignment_warmup_ratio: share of the optimizer steps over which that factor rises linearly from 0.
        distance: D(summary, pivot summary): 1 - cosine, mean squared difference, or InfoNCE on cosines.
        infonce_temperature: divisor of the cosines in InfoNCE.
        softmax_temperature: divisor of the logits in the soft tokens' softmax (never in the cross entropy).
        pooling: soft tokens to summary: mean over the response, its last position, or given weights per token.
        detach: what gets no alignment gradient: the pivots' summaries, the embeddings E, the probabilities p.
        centring: subtract each language's running mean summary before comparing.
        centring_momentum: share of the old mean kept at each micro-step.
        vocabulary_weights: safetensors file with a tensor `weights` [V] that scales each vocabulary entry's
            part in the soft tokens; none means 1 for all.
        token_weights: safetensors file with a tensor `weights` [V]; with pooling `weights`, a position counts as
            the token that it has to predict.
        head: what the ranks send each other: hidden states and their gradients (`vocab_parallel`), or shards of the
            head and its gradient on a ring (`gathered`); `auto` takes what sends less. The same results, to rounding.
        memory_budget_mb: size of the buffer for one chunk's logits on each rank, in MiB; null: 64 on a CPU, 2048 on
            a GPU, whose products want larger chunks.
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

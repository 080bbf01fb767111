"""Settings of the SOLAR loss. docs/method.md explains which are from the paper and which are our choice."""

from dataclasses import dataclass, field
from typing import Literal

Distance = Literal["cosine", "mse", "infonce"]
Pooling = Literal["mean", "last", "weights"]
PoolingTokens = Literal["soft", "hard", "hidden_states"]
ResolvedHead = Literal["vocab_parallel", "gathered"]
Head = Literal["auto"] | ResolvedHead
Detach = Literal["pivot", "embeddings", "probabilities"]
SoftTokenEmbeddings = Literal["input", "output"]

# Memory budget in MiB if none is set. That of a GPU is enough for 8,192 target tokens of one rank in bf16, a vocabulary
# of 152k (Qwen) and d up to 5,952. They are then one chunk, and every chunk reads the head and its gradient anew. That
# of a CPU is enough for 512 in fp32, a vocabulary of 32k and d up to 2,016, all without a soft cap. Products with fewer
# rows are slower.
CPU_BUDGET_MB, GPU_BUDGET_MB = 72.0, 2560.0


@dataclass(frozen=True)
class LossSettings:
    """Settings of the SOLAR loss. The defaults follow the description of the method literally.

    The paper calls a sequence's pooled representation its soft-token summary. `pipeline/config/settings.py` explains
    the metadata of the fields.

    Attributes:
        alignment_weight: weight of the alignment loss; 0 is plain supervised fine-tuning, bit for bit.
        alignment_warmup_ratio: fraction of the optimizer steps over which this weight rises linearly from 0.
        distance: distance between the pooled representations of a translation and its pivot: 1 - cosine, mean squared
            difference, or InfoNCE on cosines.
        infonce_temperature: divisor of the cosines in InfoNCE.
        softmax_temperature: divisor of the logits in the softmax of the soft tokens (not in the cross entropy).
        top_k: number of largest logits over which this softmax is taken; all other entries have probability 0 in the
            soft token. null: the whole vocabulary.
        soft_token_embeddings: matrix whose rows the soft tokens mix: the input embeddings, or the LM head (`output`).
            Makes no difference if the model ties them.
        pooling_tokens: what is pooled: soft tokens or, as an ablation, the embeddings of the target tokens (`hard`).
            With `hard`, top_k, softmax_temperature and `probabilities` in detach have no effect. `hidden_states`: the
            hidden states of a middle layer, for the baseline mid-align. Then top_k, softmax_temperature,
            soft_token_embeddings and vocabulary_weights have no effect, and detach may only have `pivot`.
        layer: with pooling_tokens `hidden_states`, the number of decoder layers below the pooled hidden states, which
            are `hidden_states[layer]` of transformers; null: half of the model's layers, rounded down.
        pooling: how tokens are pooled: mean over the response, last position only, or weighted per token.
        detach: what receives no alignment gradient: the pooled representations of the pivots, the embeddings E, or
            the probabilities p.
        centring: subtract the running mean of each language from its pooled representations before comparing them.
        centring_momentum: weight of the old running mean in the update at each micro-step.
        vocabulary_weights: safetensors file with a tensor `weights` [V] that scales the contribution of
            each vocabulary entry to the soft tokens; null: 1 for all.
        token_weights: safetensors file with a tensor `weights` [V]; with pooling `weights`, each position has the
            weight of its target token.
        head: what the ranks exchange: hidden states and their gradients (`vocab_parallel`), or blocks of the head
            and its gradient (`gathered`); `auto` selects the one that is predicted to take less time, or that
            communicates less if the speeds of the device are unknown. The results are equal up to rounding.
        memory_budget_mb: memory of each rank for the logits and hidden states of a subchunk, or with `gathered` for its
            logits and blocks of the head, in MiB; null: 72 on a CPU, and 2560 on a GPU, where larger matrix products
            are faster. The lists of a large `top_k` do not exceed this size either.
    """

    alignment_weight: float = field(default=1.0, metadata={"range": "[0, inf)", "on_resume": "may change"})
    alignment_warmup_ratio: float = field(default=0.1, metadata={"range": "[0, 1]", "on_resume": "may change"})
    distance: Distance = "cosine"
    infonce_temperature: float = field(default=0.1, metadata={"range": "(0, inf)"})
    softmax_temperature: float = field(default=1.0, metadata={"range": "(0, inf)"})
    top_k: int | None = field(default=20, metadata={"range": "(0, inf)"})
    soft_token_embeddings: SoftTokenEmbeddings = "input"
    pooling_tokens: PoolingTokens = "soft"
    layer: int | None = field(default=None, metadata={"range": "(0, inf)"})
    pooling: Pooling = "mean"
    detach: tuple[Detach, ...] = ("pivot",)
    centring: bool = False
    centring_momentum: float = field(default=0.9, metadata={"range": "[0, 1]"})
    vocabulary_weights: str | None = field(default=None, metadata={"on_resume": "same content"})
    token_weights: str | None = field(default=None, metadata={"on_resume": "same content"})
    head: Head = field(default="auto", metadata={"on_resume": "may change"})
    memory_budget_mb: float | None = field(default=None, metadata={"range": "(0, inf)", "on_resume": "may change"})

    @property
    def needs_second_softmax(self) -> bool:
        """Whether the soft tokens need a second buffer, for the softmax of all logits at their temperature."""
        return self.pooling_tokens == "soft" and self.top_k is None and self.softmax_temperature != 1

    @property
    def logit_passes(self) -> int:
        """How often the loss reads or writes all logits.

        Three products, softmax, pooling, inner products, softmax backward. With top-k, one pass to find the largest
        logits replaces the last three. With hard tokens or hidden states, nothing does.
        """
        if self.pooling_tokens != "soft":
            return 5
        return 8 if self.top_k is None else 6

    @property
    def num_selected(self) -> int | None:
        """Number of logits that the loss selects from each row; None unless soft tokens mix the top k."""
        return self.top_k if self.pooling_tokens == "soft" else None

    @property
    def compares_micro_step(self) -> bool:
        """Whether the loss depends on which sequences of all ranks are in the same micro-step."""
        return self.distance == "infonce" or self.centring

    @property
    def pools_vocabulary(self) -> bool:
        """Whether the pooled representations are mixtures of vocabulary rows."""
        return self.pooling_tokens != "hidden_states"

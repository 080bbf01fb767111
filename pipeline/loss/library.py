"""The SOLAR loss as a function of plain tensors, for training loops other than this project's.

Shape letters: N tokens, S sequences, T target tokens of this rank, V vocabulary, d hidden size, R ranks.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .chunking import AlignmentGroup
from .comm import Group, rank_and_size
from .head_choice import alignment_group
from .loss_batch import LossBatch, LossNormalizers
from .settings import Detach, Distance, LossSettings, Pooling, PoolingTokens, ResolvedHead, SoftTokenEmbeddings
from .softmax_state import accumulation_dtype
from .vocab_parallel import SolarLoss, solar_loss
from .vocabulary import Vocabulary, VocabularyShard, vocabulary_range

Matrix = Tensor | VocabularyShard

CHOICES = {  # values of the settings that are names
    "distance": get_args(Distance),
    "soft_token_embeddings": get_args(SoftTokenEmbeddings),
    "pooling_tokens": get_args(PoolingTokens),
    "pooling": get_args(Pooling),
    "head": ("auto", *get_args(ResolvedHead)),
}


def target_tokens(labels: Tensor, seq_lens: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """Find the target tokens of packed sequences.

    Args:
        labels: [N] token ids, unshifted, as in Hugging Face's models. `ignore_index` if not a target.
        seq_lens: [S] lengths of the sequences, which sum to N.

    Returns:
        (positions, targets, lengths): [T] indices of the hidden states that predict the targets, [T] targets, and [S]
        number of targets of each sequence; the last two are fields of `LossBatch`. The first token of a sequence is
        never a target.
    """
    first = torch.zeros_like(labels, dtype=torch.bool)
    first[(seq_lens.cumsum(0) - seq_lens)[seq_lens > 0]] = True
    indices = ((labels != ignore_index) & ~first).nonzero().flatten()
    sequence = torch.repeat_interleave(torch.arange(len(seq_lens), device=labels.device), seq_lens)
    return indices - 1, labels[indices], torch.bincount(sequence[indices], minlength=len(seq_lens))


def alignment_sft_loss(
    hidden: Tensor,
    loss_batch: LossBatch,
    head: Matrix,
    embedding: Matrix,
    settings: LossSettings | None = None,
    *,
    vocab_size: int | None = None,
    alignment_weight: float | None = None,
    normalizers: LossNormalizers | None = None,
    languages: int = 1,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocabulary_weights: Tensor | None = None,
    group: Group = None,
    averaged_gradients: bool = True,
) -> tuple[Tensor, SolarLoss]:
    """Compute cross entropy plus soft-token alignment over all ranks. Collective: all ranks must call it.

    Logits of the whole batch are never stored, and with several ranks each computes those of its vocabulary rows only.
    `backward()` fills the gradients of `hidden`, `head` and `embedding`, if they require any.

    Args:
        hidden: [T, d] final hidden states that predict this rank's target tokens.
        loss_batch: their sequences and pairs; it should be on the host.
        head: LM head: [V, d], equal on all ranks; a `DTensor` of that shape with placement `Shard(0)` over `group`
            (FSDP2); or a `VocabularyShard`, such as a ZeRO-3 partition: P / R of P rows, including padding rows.
        embedding: input embedding in the same form; the same object if the model ties them.
        settings: settings of the loss; None for the defaults.
        vocab_size: V without padding rows, which are never predicted. Required with a `VocabularyShard`; None for all.
        alignment_weight: overrides `settings.alignment_weight`, for example during its warm-up.
        normalizers: counts of the global batch, if it has several micro-batches; None for those of this one.
        languages: number of languages, for `SolarLoss.language_ce`.
        logit_scale, softcap: factor of the logits, then z -> softcap * tanh(z / softcap).
        vocabulary_weights: [V] weights of the soft tokens, or None.
        group: process group, or None for a single process (not the default group).
        averaged_gradients: whether gradients of `hidden` and of full matrices are averaged over ranks afterwards, as
            DDP, FSDP and ZeRO do. They are then multiplied by R. Those of shards are never averaged.

    Returns:
        The scalar to call `backward()` on, equal on all ranks, and the parts of the loss.

    Raises:
        ValueError: the two matrices have different forms, a `DTensor` has another placement, a `VocabularyShard` does
            not start at its rank's first row, a setting is unknown or only for the trainer, or the fields of
            `loss_batch` do not fit `hidden` or each other.
    """
    settings = settings or LossSettings()
    _check_settings(settings)
    matrices, vocabulary = _shard_vocabulary(head, embedding, vocab_size, vocabulary_weights, group)
    _check_batch(hidden, loss_batch, vocabulary.size, alignment_group(settings))
    vocabulary = replace(vocabulary, logit_scale=logit_scale, softcap=softcap)
    weight = settings.alignment_weight if alignment_weight is None else alignment_weight
    counts = normalizers or _count(loss_batch, hidden.device, group)
    hidden = hidden.to(vocabulary.head.weight.dtype)  # trainers with mixed precision return hidden states in fp32
    with torch.cuda.device_of(hidden):  # on which Triton launches its kernels
        result = solar_loss(hidden, loss_batch, vocabulary, settings, weight, counts, languages, None, group)
    factor = rank_and_size(group)[1] if averaged_gradients else 1
    loss = _WithVocabularyGradients.apply(result.loss, factor, matrices, *(rows.leaf for rows in matrices))
    return loss, result


def _check_settings(settings: LossSettings) -> None:
    """Raise ValueError if a setting has an unknown value, or an effect in the trainer only."""
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise ValueError(f"{name} is {getattr(settings, name)!r}; choose from {', '.join(choices)}")
    if unknown := set(settings.detach) - set(get_args(Detach)):
        raise ValueError(f"detach has {', '.join(sorted(unknown))}; choose from {', '.join(get_args(Detach))}")
    if settings.top_k is not None and settings.top_k < 1:
        raise ValueError(f"top_k is {settings.top_k}; it must be at least 1, or None for the whole vocabulary")
    if not settings.pools_vocabulary:
        raise ValueError("pooling_tokens 'hidden_states' is a setting of the trainer; use 'soft' or 'hard'")
    if settings.centring or settings.vocabulary_weights is not None:
        raise ValueError(
            "centring and vocabulary_weights (a path) are settings of the trainer; unset them, and pass the tensor "
            "`vocabulary_weights` to this function"
        )


def _check_batch(hidden: Tensor, batch: LossBatch, vocab_size: int, groups: AlignmentGroup) -> None:
    """Raise ValueError if the fields of a batch contradict each other, or its sequences are in an unsupported order.

    Args:
        groups: kind of alignment group. A pivot must be at hand when its translations are aligned.
    """
    count, sequences = len(batch.targets), len(batch.lengths)
    if hidden.dim() != 2 or len(hidden) != count:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, but there are {count} target tokens; give [T, d]")
    if int(batch.lengths.sum()) != count:
        raise ValueError(f"LossBatch.lengths sum to {int(batch.lengths.sum())}, but there are {count} target tokens")
    if count and not 0 <= int(batch.targets.min()) <= int(batch.targets.max()) < vocab_size:
        raise ValueError(f"LossBatch.targets must be between 0 and {vocab_size - 1}, the last entry of the vocabulary")
    own = torch.arange(sequences, device=batch.pivot.device)
    if not bool(((batch.pivot >= 0) & (batch.pivot < sequences)).all()):
        raise ValueError(f"LossBatch.pivot must be an index of the {sequences} sequences; without a pivot, its own")
    if not bool((batch.pivot[batch.pivot] == batch.pivot).all()):
        raise ValueError("LossBatch.pivot of a pivot must be its own index")
    nearest = torch.where(batch.pivot == own, own, 0).cummax(0).values if sequences else own
    if groups == "sequence" and bool((batch.pivot > own).any()):
        raise ValueError("LossBatch: a pivot must precede its translations")
    if groups == "pair_group" and bool((batch.pivot != nearest).any()):
        raise ValueError("LossBatch: unless detach has 'pivot', the translations of a pivot must follow it directly")


def _shard_vocabulary(
    head: Matrix, embedding: Matrix, vocab_size: int | None, weights: Tensor | None, group: Group
) -> tuple[list["_Rows"], Vocabulary]:
    """Return this rank's rows of the one or two matrices, and the vocabulary that consists of them."""
    rank, ranks = rank_and_size(group)
    matrices = [_Rows.of(head, vocab_size, rank, ranks)]
    if embedding is not head:
        matrices.append(_Rows.of(embedding, vocab_size, rank, ranks))
    first, last = matrices[0], matrices[-1]
    if (first.vocab_size, first.padded_size) != (last.vocab_size, last.padded_size):
        raise ValueError("head and embedding must have the same number of rows and the same sharding")
    start, end = vocabulary_range(first.vocab_size, first.padded_size, rank, ranks)
    vocabulary = Vocabulary(
        size=first.vocab_size,
        head=first.shard,
        embedding=last.shard,
        weights=None if weights is None else weights[start:end],
        padded_size=first.padded_size,
    )
    return matrices, vocabulary


def _count(loss_batch: LossBatch, device: torch.device, group: Group) -> LossNormalizers:
    local = loss_batch.normalizers()
    counts = torch.tensor([local.tokens, local.pairs], dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(counts, group=group)
    return LossNormalizers(*counts.tolist())


@dataclass
class _Rows:
    """A vocabulary matrix in one of the accepted forms.

    Attributes:
        leaf: the tensor that autograd fills.
        shard: this rank's rows of it, without padding, with an accumulator if `leaf` requires a gradient.
        vocab_size, padded_size: number of rows of the whole matrix.
        full: whether `leaf` has the rows of all ranks.
    """

    leaf: Tensor
    shard: VocabularyShard
    vocab_size: int
    padded_size: int
    full: bool

    @classmethod
    def of(cls, matrix: Matrix, vocab_size: int | None, rank: int, ranks: int) -> "_Rows":
        leaf = matrix.weight if isinstance(matrix, VocabularyShard) else matrix
        if isinstance(matrix, VocabularyShard) and vocab_size is None:
            raise ValueError("a VocabularyShard requires vocab_size")
        if isinstance(leaf, DTensor) and leaf.placements != (Shard(0),):
            raise ValueError(f"a DTensor must have the placement (Shard(0),), not {leaf.placements}")
        full = not isinstance(leaf, DTensor) and not isinstance(matrix, VocabularyShard)
        size = vocab_size or len(leaf)
        # Shard(0) and ZeRO-3 give every rank the same number of rows, except for the last ones.
        rows = len(leaf) if isinstance(matrix, VocabularyShard) else -(-len(leaf) // ranks)
        start, end = vocabulary_range(size, rows * ranks, rank, ranks)
        if isinstance(matrix, VocabularyShard) and matrix.start != start:
            raise ValueError(f"rank {rank}: a VocabularyShard of {rows} rows, with padding, starts at {start}, not at "
                             f"{matrix.start}")  # fmt: skip
        local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        local = local.detach()[start:end] if full else local.detach()[: end - start]
        grad = torch.zeros(local.shape, dtype=accumulation_dtype(local.dtype), device=local.device)
        shard = VocabularyShard(local, start, grad if leaf.requires_grad and torch.is_grad_enabled() else None)
        return cls(leaf, shard, size, rows * ranks, full)

    def gradient(self, factor: Tensor) -> Tensor | None:
        """Return the gradient of `leaf` times a factor, or None if it requires none."""
        if self.shard.grad is None:
            return None
        local = (self.shard.grad * factor).to(self.leaf.dtype)
        leaf = self.leaf.to_local() if isinstance(self.leaf, DTensor) else self.leaf
        grad = torch.zeros_like(leaf)
        start = self.shard.start if self.full else 0
        grad[start : start + len(local)] = local
        if isinstance(self.leaf, DTensor):
            mesh, shape, stride = self.leaf.device_mesh, self.leaf.shape, self.leaf.stride()
            return DTensor.from_local(grad, mesh, self.leaf.placements, shape=shape, stride=stride, run_check=False)
        return grad


class _WithVocabularyGradients(torch.autograd.Function):
    """Identity on the loss whose backward also returns the gradients of the vocabulary matrices."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: int, matrices: list[_Rows], *leaves: Tensor) -> Tensor:
        ctx.factor, ctx.matrices = factor, matrices
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        vocabulary = [rows.gradient(grad * ctx.factor if rows.full else grad) for rows in ctx.matrices]
        return grad * ctx.factor, None, None, *vocabulary

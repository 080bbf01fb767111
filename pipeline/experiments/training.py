"""Train a small model in one process, with the same model, loss, data order and schedules as the trainer.

An experiment consists of hundreds of short runs, for each of which the trainer would need a launcher and DeepSpeed.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.records import Record
from data_prep.shards.format import PIVOT, TRANSLATION, PackedRow
from data_prep.tokenization.chat_template import ChatEncoder
from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossSettings, RunningMeans, Vocabulary, VocabularyShard
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.packed_attention import resolve_attention
from pipeline.models.param_groups import adamw_arguments, set_learning_rates
from pipeline.models.solar_model import SolarModel
from pipeline.training.schedules import alignment_weight, embedding_learning_rate, learning_rate

BOTH = ("solar", "auxiliary")  # terms of the loss
AuxiliaryLoss = Callable[[PreTrainedModel, MicroBatch], Tensor]  # a scalar that includes its weight


class InMemoryRows(list[PackedRow]):
    """Packed rows in memory, as a `RowSource` of the loader."""

    def __init__(self, rows: Iterable[PackedRow], languages: Sequence[str]) -> None:
        super().__init__(rows)
        self.manifest = {"languages": list(languages)}


def pack_groups(tokenizer: PreTrainedTokenizerBase, groups: Iterable[Sequence[Record]]) -> list[PackedRow]:
    """Tokenize each group of records into one row. The first record of a group is its pivot.

    Raises:
        UserError: a record cannot be encoded with the chat template.
    """
    encoder = ChatEncoder(tokenizer)
    rows = []
    for group in groups:
        sequences = []
        for encoded in encoder.encode([record.messages for record in group], [record.tools for record in group]):
            if isinstance(encoded, UserError):
                raise encoded
            sequences.append(np.array(encoded, np.int32))
        langs, roles = [record.lang for record in group], [PIVOT] + [TRANSLATION] * (len(group) - 1)
        rows.append(PackedRow.from_encoded(sequences, [record.pair_id for record in group], langs, roles))
    return rows


class UnpaddedSplit(BatchSplit):
    """Division of a global batch whose micro-batches are one row without padding."""

    def collate(
        self, rows: list[PackedRow], languages: list[str], pad_token_id: int, token_weights: Tensor | None
    ) -> MicroBatch:
        """Concatenate rows into one and collate it. See `BatchSplit.collate`."""
        return super().collate([concatenate(rows)], languages, pad_token_id, token_weights)


def concatenate(rows: Sequence[PackedRow]) -> PackedRow:
    """Return one row with the sequences of all rows."""
    arrays = zip(*((row.input_ids, row.labels, row.seq_lens, _copies(row)) for row in rows), strict=True)
    ids, labels, lengths, copies = map(np.concatenate, arrays)
    pair_id, lang, role = (
        list(chain(*lists)) for lists in zip(*((r.pair_id, r.lang, r.role) for r in rows), strict=True)
    )
    return PackedRow(ids, labels, lengths, pair_id, lang, role, copies)


def _copies(row: PackedRow) -> np.ndarray:
    return np.ones_like(row.seq_lens) if row.copies is None else row.copies


@dataclass(frozen=True)
class TrainingJob:
    """Everything that determines a training run, except for the model and the rows.

    Attributes:
        training: batch size, steps and optimizer.
        loss: the SOLAR loss; default: plain fine-tuning.
        seed: random seed of the data order.
        vocabulary_weights: [V] fp32 weight of each vocabulary entry in the soft tokens, or None.
        auxiliary_loss: loss to add to the SOLAR loss, or None.
        transform_batch: function applied to each batch, or None.
        alternate: whether odd steps train the auxiliary loss alone, and even steps the SOLAR loss alone.
    """

    training: TrainingSettings
    loss: LossSettings = field(default_factory=lambda: LossSettings(alignment_weight=0))
    seed: int = 0
    vocabulary_weights: Tensor | None = None
    auxiliary_loss: AuxiliaryLoss | None = None
    transform_batch: Callable[[MicroBatch], MicroBatch] | None = None
    alternate: bool = False


def run_training_job(
    model: PreTrainedModel, rows: InMemoryRows, pad_token_id: int, job: TrainingJob
) -> dict[str, list[float]]:
    """Train a model in place for `job.training.max_steps` steps.

    Returns:
        The loss of each step by name: "ce" (cross-entropy), "alignment" and "term" (the auxiliary loss). With an
        alignment or auxiliary loss also "gradient_share" of the step in the middle of the run: the norm of its
        gradient, divided by the sum of this norm and that of the cross entropy.
    """
    training, steps = job.training, job.training.max_steps or 0
    languages = len(rows.manifest["languages"])
    split = UnpaddedSplit(training.train_batch_size, training.train_batch_size, 0, 1)
    loader = Loader(rows, split, job.seed, pad_token_id)
    vocab_size, hidden_size = vocabulary_parameter(model.get_input_embeddings()).shape
    solar = SolarModel(model, job.loss, vocab_size, languages)
    groups, options = adamw_arguments(model, vocabulary_parameter(model.get_input_embeddings()), training)
    optimizer = torch.optim.AdamW(groups, **options)
    running_means = RunningMeans.zeros(languages, hidden_size, model.device) if job.loss.centring else None
    history: dict[str, list[float]] = {"ce": [], "alignment": [], "term": []}
    model.train()
    attention = model.config._attn_implementation
    model.set_attn_implementation(resolve_attention(None, model.config))  # the trainer's default
    for step in range(steps):
        (batch,) = loader.next()
        batch = job.transform_batch(batch) if job.transform_batch else batch
        rates = learning_rate(training, step, steps), embedding_learning_rate(training, step, steps)
        set_learning_rates(optimizer.param_groups, *rates)
        weight = alignment_weight(job.loss, step, steps)
        if step == steps // 2 and (job.loss.alignment_weight or job.auxiliary_loss):
            history["gradient_share"] = [_gradient_share(solar, batch, job, weight, running_means)]
        terms = BOTH if not job.alternate else ("auxiliary",) if step % 2 else ("solar",)
        losses = _backward(solar, batch, job, weight, running_means, terms)
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        for name, value in losses.items():
            history[name].append(value)
    model.set_attn_implementation(attention)
    model.eval()
    return history


def _backward(
    solar: SolarModel,
    batch: MicroBatch,
    job: TrainingJob,
    weight: float,
    running_means: RunningMeans | None,
    terms: Sequence[str],
) -> dict[str, float]:
    """Compute the gradient of some of the terms of the loss, and return the value of each part of the loss."""
    model, normalizers = solar.model, batch.loss_batch.normalizers()
    batch = batch.to(model.device)
    vocabulary, grads = local_vocabulary(model, job.vocabulary_weights)
    loss, parts = solar(batch, vocabulary, weight, normalizers, running_means, None, 1.0)
    if "solar" not in terms:
        loss = 0 * loss
        for grad in grads.values():  # the forward pass has added the gradient of the head
            grad.zero_()
    auxiliary = job.auxiliary_loss(model, batch) if job.auxiliary_loss and "auxiliary" in terms else loss.new_zeros(())
    (loss + auxiliary).backward()
    for parameter, grad in grads.items():  # the SOLAR loss accumulates these outside of autograd
        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
    return {
        "ce": float(parts.ce_sum) / max(normalizers.tokens, 1),
        "alignment": float(parts.distance_sum) / max(normalizers.pairs, 1),
        "term": float(auxiliary.detach()),
    }


def _gradient_share(
    solar: SolarModel, batch: MicroBatch, job: TrainingJob, weight: float, running_means: RunningMeans | None
) -> float:
    """Return |a| / (|a| + |c|), with c the gradient of the cross entropy and a that of all other terms."""

    def gradient(weight: float, terms: Sequence[str]) -> Tensor:
        _backward(solar, batch, job, weight, copy.deepcopy(running_means), terms)
        flat = torch.cat([parameter.grad.flatten() for parameter in solar.parameters() if parameter.grad is not None])
        solar.zero_grad(set_to_none=True)
        return flat

    ce = gradient(0.0, ("solar",))
    others = gradient(weight, BOTH) - ce
    return float(others.norm() / (others.norm() + ce.norm()))


def local_vocabulary(model: PreTrainedModel, weights: Tensor | None) -> tuple[Vocabulary, dict[nn.Parameter, Tensor]]:
    """Return the full vocabulary as the shard of a single process, and its zeroed gradients by parameter."""
    embedding = vocabulary_parameter(model.get_input_embeddings())
    head = embedding if head_config(model).tied else vocabulary_parameter(model.get_output_embeddings())
    grads = {parameter: torch.zeros_like(parameter) for parameter in (embedding, head)}
    shards = {parameter: VocabularyShard(parameter.data, 0, grad) for parameter, grad in grads.items()}
    return Vocabulary(len(embedding), shards[head], shards[embedding], weights=weights), grads

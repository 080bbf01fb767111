"""One process training one small model with the trainer's own model wrapper, loss, data order and schedules.

The trainer itself needs a launcher and DeepSpeed per run; the experiment has hundreds of short ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.shards.format import IGNORE, PIVOT, TRANSLATION, PackedRow
from data_prep.tokenization.chat_template import ChatEncoder
from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossSettings, RunningMeans, Vocabulary, VocabularyShard
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.param_groups import adamw_arguments
from pipeline.models.solar_model import SolarModel
from pipeline.training.schedules import alignment_weight, learning_rate

PLAIN = LossSettings(alignment_weight=0)
Term = Callable[[PreTrainedModel, MicroBatch], Tensor]  # added to the loss, its weight included


class Rows(list[PackedRow]):
    """Packed rows in memory, for `pipeline.data.loader.Loader`."""

    def __init__(self, rows: Sequence[PackedRow], languages: Sequence[str]) -> None:
        super().__init__(rows)
        self.manifest = {"languages": list(languages)}


def pack_groups(tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[dict[str, Any]]]) -> list[PackedRow]:
    """One row per group of records {pair_id, lang, question, answer}, whose first is the pivot."""
    encoder = ChatEncoder(tokenizer)
    rows = []
    for group in groups:
        chats = [
            [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in group
        ]
        tokens = []
        for found in encoder.encode(chats):
            if isinstance(found, UserError):
                raise found
            tokens.append(found)
        marked = np.concatenate([np.array(found, np.int32) for found in tokens])
        ids = np.where(marked < 0, ~marked, marked)
        rows.append(
            PackedRow(
                ids,
                np.where(marked < 0, ids, IGNORE),
                np.array([len(found) for found in tokens], np.int32),
                [r["pair_id"] for r in group],
                [r["lang"] for r in group],
                [PIVOT] + [TRANSLATION] * (len(group) - 1),
            )
        )
    return rows


@dataclass(frozen=True)
class Run:
    """What decides a training besides model and rows. `term` is added to the loss; `change` alters each batch."""

    training: TrainingSettings
    loss: LossSettings = PLAIN
    seed: int = 0
    vocabulary_weights: Tensor | None = None
    term: Term | None = None
    change: Callable[[MicroBatch], MicroBatch] | None = None


def train(model: PreTrainedModel, rows: Rows, pad_token_id: int, run: Run) -> dict[str, list[float]]:
    """Train in place for `run.training.max_steps` steps; returns the losses by name, one per step."""
    t, steps = run.training, run.training.max_steps or 0
    device = model.device
    loader = Loader(rows, BatchSplit(t.train_batch_size, t.train_batch_size, 0, 1), run.seed, pad_token_id)  # type: ignore[arg-type]
    size, hidden = vocabulary_parameter(model.get_input_embeddings()).shape
    solar = SolarModel(model, run.loss, size, len(rows.manifest["languages"]))
    vocabulary = whole_vocabulary(model, run.vocabulary_weights)
    groups, options = adamw_arguments(model, t)
    optimizer = torch.optim.AdamW(groups, **options)
    running_means = RunningMeans.zeros(len(rows.manifest["languages"]), hidden, device) if run.loss.centring else None
    history: dict[str, list[float]] = {"ce": [], "alignment": [], "term": []}
    model.train()
    for step in range(steps):
        (batch,) = loader.next()
        batch = run.change(batch) if run.change else batch
        normalizers = batch.loss_batch.normalizers()
        moved = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, step, steps)
        weight = alignment_weight(run.loss, step, steps)
        loss, parts = solar(moved, vocabulary, weight, normalizers, running_means, None, 1.0)
        extra = run.term(model, moved) if run.term else loss.new_zeros(())
        (loss + extra).backward()
        take_gradients(model, vocabulary)
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        history["ce"].append(float(parts.ce_sum) / max(normalizers.tokens, 1))
        history["alignment"].append(float(parts.distance_sum) / max(normalizers.pairs, 1))
        history["term"].append(float(extra.detach()))
    model.eval()
    return history


def whole_vocabulary(model: PreTrainedModel, weights: Tensor | None) -> Vocabulary:
    """The model's head and embedding as the one shard of one process."""
    facts = head_config(model)
    matrix = vocabulary_parameter(model.get_input_embeddings()).data
    embedding = VocabularyShard(matrix, 0, torch.zeros_like(matrix, dtype=torch.float32))
    head = embedding
    if not facts.tied:
        matrix = vocabulary_parameter(model.get_output_embeddings()).data
        head = VocabularyShard(matrix, 0, torch.zeros_like(matrix, dtype=torch.float32))
    return Vocabulary(len(matrix), head, embedding, weights=weights)


def take_gradients(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Add what the loss has summed up in the shards to the parameters' gradients, and empty the shards."""
    places = [(vocabulary.embedding, model.get_input_embeddings())]
    if vocabulary.head is not vocabulary.embedding:
        places.append((vocabulary.head, model.get_output_embeddings()))
    for shard, module in places:
        parameter = vocabulary_parameter(module)
        assert shard.grad is not None
        grad = shard.grad.to(parameter.dtype)
        parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.add_(grad)
        shard.grad.zero_()

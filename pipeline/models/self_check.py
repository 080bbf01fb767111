"""Check that the loss and packed attention reproduce a model's own forward and backward pass.

The loss replaces a model's LM head, input embedding and attention mask. Whether the result is the same depends on what
the code of the model does, such as scaling logits, ignoring position ids, or adding another loss. Instead of a list of
supported families, the check compares the two results on a narrow model of the same class, in float64 on the CPU.
"""

import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from data_prep.shards.format import IGNORE, PIVOT, PackedRow
from pipeline.common.errors import UserError
from pipeline.config.settings import ModelSettings
from pipeline.data.micro_batch import MicroBatch, collate
from pipeline.loss import LossNormalizers, LossSettings, Vocabulary, VocabularyShard
from pipeline.loss.soft_tokens import head_logits
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.narrow_model import VOCAB, narrow_model
from pipeline.models.packed_attention import MASKED, PACKED, resolve_attention
from pipeline.models.sequence_parallel import HeadExchange
from pipeline.models.solar_model import SolarModel, decoder_hidden_states

ROWS = ((7, 9, 1, 5), (12, 6))  # sequence lengths of two packed rows, the second of which is padded
# Norms, rotary embeddings and routers may be computed in float32, whose rounding errors are far below this.
TOLERANCE = 1e-5


def check_model(config: PreTrainedConfig, settings: ModelSettings, sequence_parallel_size: int = 1) -> None:
    """Check that a model of this class and configuration can be trained. It takes about a second.

    A kernel that needs a GPU is replaced by the default attention implementation of the model.

    Args:
        config: configuration of the model. It is not changed.
        settings: the model section of a recipe.
        sequence_parallel_size: number of ranks that share a row.

    Raises:
        UserError: the model does not run on packed sequences, or its results differ. The message says what differs.
    """
    requested = settings.attn_implementation
    implementation = resolve_attention(requested if requested in (PACKED, *MASKED) else None, config)
    difference = find_difference(config, implementation, settings.trust_remote_code, sequence_parallel_size)
    if difference is None:
        return
    hint = ""
    if implementation == PACKED and sequence_parallel_size == 1:
        working = (other for other in MASKED if not find_difference(config, other, settings.trust_remote_code))
        hint = "".join(f"; set model.attn_implementation to {other}" for other in itertools.islice(working, 1))
    name = settings.path or "model.config"
    raise UserError(f"{name}: model_type {config.model_type!r} is not supported: {difference}{hint}")


def find_difference(
    config: PreTrainedConfig, attention: str, trust_remote_code: bool = False, sequence_parallel_size: int = 1
) -> str | None:
    """Return what differs first between a narrow model and our forward and backward pass, or None.

    Torch's random state does not change.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = narrow_model(config, attention, trust_remote_code)
            for description, ours, own, scale in _comparisons(model, sequence_parallel_size):
                error = float((ours - own).norm() / scale)
                if not error < TOLERANCE:
                    return f"{description} (relative difference {error:.1g})"
        except Exception as error:  # the code of any model runs here
            lines = str(error).strip().splitlines() or [""]
            return f"it does not run on packed sequences ({type(error).__name__}: {lines[0][:200]})"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of transformers, which would be about the narrow model."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _comparisons(model: PreTrainedModel, parts: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield a description, our result, the model's own result, and the norm that an error is relative to."""
    rows = _packed_rows()
    packed = collate(rows, ["en"], pad_token_id=0, width_multiple=parts)
    single = [collate([sequence], ["en"], pad_token_id=0) for row in rows for sequence in _sequences(row)]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own_logits = torch.cat([model(input_ids=batch.input_ids, use_cache=False).logits[0] for batch in single])
    own = own_result(model, single)
    model.set_attn_implementation(implementation)
    scale = own_logits.norm()
    with torch.no_grad():
        logits = torch.cat([_our_logits(model, batch) for batch in single])
        yield "its logits are not reproduced", logits, own_logits, scale
        width = packed.input_ids.shape[1]
        is_token = torch.cat([torch.arange(width) < len(row.input_ids) for row in rows])
        logits = _our_logits(model, packed)[is_token]
        yield "the logits of a packed sequence are not those of the same sequence alone", logits, own_logits, scale
        if parts > 1:
            logits = _logits_of_parts(model, packed, parts)[is_token]
            yield "the logits of a row that ranks share are not those of the whole row", logits, own_logits, scale
    ours = our_result(model, packed)
    yield "its own loss is not the cross entropy of its logits", ours.loss, own.loss, own.loss.abs()
    total = torch.stack([gradient.norm() for gradient in own.gradients.values()]).norm()
    for name, gradient in reversed(own.gradients.items()):  # an error continues from the output to the input
        # The gradient of some parameters is zero but for rounding, such as that of a bias of the attention keys.
        yield f"the gradient of {name} is not its own", ours.gradients[name], gradient, gradient.norm() + 1e-3 * total


def _packed_rows() -> list[PackedRow]:
    """Return rows of random tokens. The targets are the second half of each sequence."""
    generator = np.random.default_rng(0)
    rows = []
    for lengths in ROWS:
        ids = generator.integers(1, VOCAB, sum(lengths)).astype(np.int32)
        is_prompt = np.concatenate([np.arange(length) < (length + 1) // 2 for length in lengths])
        labels = np.where(is_prompt, IGNORE, ids).astype(np.int32)
        count, pair_ids = len(lengths), [str(i) for i in range(len(lengths))]
        rows.append(PackedRow(ids, labels, np.array(lengths, np.int32), pair_ids, ["en"] * count, [PIVOT] * count))
    return rows


def _sequences(row: PackedRow) -> Iterator[PackedRow]:
    """Yield each sequence of a row as a row."""
    ends = np.cumsum(row.seq_lens)
    for i, (start, end) in enumerate(zip(ends - row.seq_lens, ends, strict=True)):
        one = slice(i, i + 1)
        yield PackedRow(
            row.input_ids[start:end], row.labels[start:end], row.seq_lens[one], row.pair_id[one], row.lang[one],
            row.role[one],
        )  # fmt: skip


@dataclass(frozen=True)
class LossResult:
    """Mean cross entropy over the target tokens, and the gradient of each parameter by name."""

    loss: Tensor
    gradients: dict[str, Tensor]


def own_result(model: PreTrainedModel, single: list[MicroBatch]) -> LossResult:
    """Run the model's own `forward(labels=...)` on one sequence at a time, then backward."""
    model.zero_grad()
    total = sum(len(batch.positions) for batch in single)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in single:
        if count := len(batch.positions):
            labels = torch.full_like(batch.input_ids, IGNORE)
            labels[0, batch.positions + 1] = batch.loss_batch.targets
            loss = loss + model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss * (count / total)
    loss.backward()
    return LossResult(loss.detach(), _gradients(model))


def our_result(model: PreTrainedModel, batch: MicroBatch) -> LossResult:
    """Run our cross entropy on packed rows, then backward. The vocabulary is a single shard."""
    model.zero_grad()
    head, embedding = (vocabulary_parameter(m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    settings = head_config(model)
    embedding_shard = VocabularyShard(embedding.detach(), 0, torch.zeros_like(embedding))
    head_shard = embedding_shard if settings.tied else VocabularyShard(head.detach(), 0, torch.zeros_like(head))
    vocabulary = Vocabulary(
        VOCAB,
        head_shard,
        embedding_shard,
        bias=None if settings.bias is None else settings.bias.detach(),
        bias_grad=None if settings.bias is None else torch.zeros_like(settings.bias),
        logit_scale=settings.logit_scale,
        softcap=settings.softcap,
    )
    normalizers = LossNormalizers(batch.loss_batch.normalizers().tokens, 0)
    module = SolarModel(model, LossSettings(), VOCAB, num_languages=1)
    loss, _ = module(batch, vocabulary, 0.0, normalizers, None, None, 1.0)
    loss.backward()
    gradients = _gradients(model)
    names = {id(p): name for name, p in model.named_parameters()}
    shards = [(embedding, embedding_shard.grad), (head, head_shard.grad), (settings.bias, vocabulary.bias_grad)]
    gradients |= {names[id(parameter)]: grad for parameter, grad in shards if grad is not None}
    return LossResult(loss.detach(), gradients)


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a copy of each gradient, or zeros if there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def _logits_of_parts(model: PreTrainedModel, batch: MicroBatch, parts: int) -> Tensor:
    """Compute the logits of all tokens, [B * N, V], with the tokens in the order in which ranks share them.

    An operation other than attention that combines neighboring tokens, such as a convolution, changes the result.
    """
    order = torch.arange(batch.input_ids.numel()).view(-1, parts).T.flatten()
    input_ids, position_ids = (x.flatten()[order][None] for x in (batch.input_ids, batch.position_ids))
    reordered = replace(batch, input_ids=input_ids, position_ids=position_ids)
    logits = _our_logits(model, reordered, HeadExchange(parts, None))
    return logits[order.argsort()]


def _our_logits(model: PreTrainedModel, batch: MicroBatch, head_exchange: HeadExchange | None = None) -> Tensor:
    """Compute the logits of all tokens of a micro-batch with `decoder_hidden_states` and our head, [B * N, V]."""
    settings = head_config(model)
    embeddings = vocabulary_parameter(model.get_input_embeddings())[batch.input_ids] * settings.embed_scale
    hidden = decoder_hidden_states(model, embeddings, batch, head_exchange).flatten(0, 1)
    head = vocabulary_parameter(model.get_output_embeddings())
    return head_logits(hidden, head, settings.bias, settings.logit_scale, settings.softcap)

"""Loss and gradients of a tiny model on ranks that share rows, for `tests.workers`."""

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.settings import AdapterSettings
from pipeline.data.micro_batch import MicroBatch, collate, take_part
from pipeline.loss import LossNormalizers, LossSettings, Vocabulary, VocabularyShard, vocabulary_range
from pipeline.loss.comm import Group, rank_and_size
from pipeline.models.adapters import add_adapter
from pipeline.models.families import head_config, vocabulary_parameter
from pipeline.models.sequence_parallel import HeadExchange
from pipeline.models.solar_model import SolarModel
from tests.pipeline.models.test_models import VOCAB, rows, tiny

LANGUAGES = ["en", "sw", "th"]


def micro_batches(count: int, parts: int, weighted: bool) -> list[MicroBatch]:
    """Return the whole micro-batches of `count` groups of ranks: two rows of 16 and 13 tokens, then other rows."""
    both, weights = rows(), torch.arange(VOCAB) / VOCAB if weighted else None
    return [collate(some, LANGUAGES, 0, weights, parts) for some in (both, both[1:], both[:1], both)][:count]


def gradients(
    group: Group,
    family: str,
    groups: int,
    parts: int,
    settings: LossSettings,
    checkpointing: bool,
    adapter: AdapterSettings | None = None,
) -> dict[str, Tensor]:
    """Compute the loss of `groups` micro-batches, and the gradients of all parameters, summed over ranks.

    Args:
        group: `groups` * `parts` ranks, or None to compute all micro-batches one after the other in this process.
        family: model type.
        settings: settings of the loss.
        checkpointing: whether to recompute activations.
        adapter: adapter to add to the model, whose random weights are then the only ones with a gradient.
    """
    rank, size = rank_and_size(group)
    model = tiny(family, tied=False).train()
    if adapter is not None:
        model = add_adapter(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # with peft's zeros, lora_A has no gradient
                torch.nn.init.normal_(parameter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = micro_batches(groups, parts, settings.pooling == "weights")
    counts = [batch.loss_batch.normalizers() for batch in whole]
    normalizers = LossNormalizers(sum(c.tokens for c in counts), sum(c.pairs for c in counts))
    padded = -(-VOCAB // size) * size
    start, end = vocabulary_range(VOCAB, padded, rank, size)

    def shard(matrix: Tensor) -> VocabularyShard:
        return VocabularyShard(matrix.detach()[start:end].clone(), start, torch.zeros(end - start, matrix.shape[1]))

    head, embedding = (vocabulary_parameter(m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    vocabulary = Vocabulary(
        VOCAB, shard(head), shard(embedding), logit_scale=head_config(model).logit_scale, padded_size=padded
    )
    exchange = None
    if group is not None:
        # All four workers must take part when gloo creates groups.
        exchange = HeadExchange(parts, group if size == parts else dist.new_subgroups(parts)[0])
        whole = [take_part(whole[rank // parts], rank % parts, parts)]
    module = SolarModel(model, settings, padded, len(LANGUAGES), head_exchange=exchange)
    total = torch.zeros(())
    for batch in whole:
        loss, result = module(batch, vocabulary, 1.0, normalizers, None, group, 1.0)
        loss.backward()
        total += result.loss.detach()
    result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if group is not None:
        for gradient in result.values():
            dist.all_reduce(gradient, group=group)
    return result | {"loss": total, "head": vocabulary.head.grad, "embedding": vocabulary.embedding.grad}  # type: ignore[dict-item]

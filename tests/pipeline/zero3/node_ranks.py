"""Loss, lookup and traffic with a vocabulary that each node divides between its ranks, for `tests.workers`.

The partitions are built by hand instead of by DeepSpeed, so that all combinations run in a process group that exists.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.benchmarks.ranks import HIDDEN, SEQUENCE_LENGTH, VOCAB, CollectiveCounter, random_inputs
from pipeline.loss import (
    LossNormalizers,
    LossSettings,
    add_hidden_state_alignment,
    embedding_lookup,
    solar_loss,
    vocabulary_range,
)
from pipeline.loss.comm import rank_and_size
from pipeline.loss.settings import Head
from pipeline.models.families import HeadConfig
from pipeline.zero3.vocabulary_shards import NodeExchange, VocabularyShards
from tests.pipeline.loss.cases import LANGUAGES, Case, local_inputs


@functools.cache
def node_group(size: int) -> dist.ProcessGroup:
    return dist.new_subgroups(size)[0]


def partition(matrix: Tensor, padded_size: int, world: dist.ProcessGroup) -> nn.Parameter:
    """Return the ZeRO-3 partition of a [V, ...] parameter as an empty parameter with DeepSpeed's attributes."""
    rank, ranks = rank_and_size(world)
    padded = torch.cat([matrix, torch.full((padded_size - len(matrix), *matrix.shape[1:]), 9.0, dtype=matrix.dtype)])
    parameter = nn.Parameter(torch.empty(0, dtype=matrix.dtype))
    parameter.ds_tensor = padded.flatten().chunk(ranks)[rank]  # type: ignore[attr-defined]
    parameter.ds_shape = padded.shape  # type: ignore[attr-defined]
    return parameter


def shards_of(
    matrices: dict[str, Tensor],
    padded_size: int,
    size: int,
    world: dist.ProcessGroup,
    case: Case,
    weights: Tensor | None = None,
) -> VocabularyShards:
    """Return the shards of nodes of `size` ranks."""
    parameters = {name: partition(matrix, padded_size, world) for name, matrix in matrices.items()}
    head = HeadConfig("head" not in parameters, parameters.get("bias"), case.logit_scale, case.softcap, 1.0)
    vocab_size, node = len(matrices["embedding"]), node_group(size)
    exchange = NodeExchange(world, node) if size < dist.get_world_size(world) else None
    cpu = torch.device("cpu")
    return VocabularyShards(parameters, head, vocab_size, padded_size, weights, node, exchange, cpu)


def node_results(world: dist.ProcessGroup, case: Case, size: int) -> dict[str, Tensor]:
    """Compute the loss over all ranks, and the gradients of this rank's target tokens and ZeRO-3 partitions."""
    rank, ranks = rank_and_size(world)
    local, tokens, hidden, t, normalizers = local_inputs(case, rank)
    names = {"embedding": t.embedding, "head": t.head, "bias": t.bias}
    used = ("embedding", *(() if case.tied else ("head",)), *(("bias",) if case.bias else ()))
    matrices = {name: names[name].to(case.dtype) for name in used}
    weights = t.weights.to(case.dtype) if case.vocabulary_weights else None
    shards, node = shards_of(matrices, case.padded_size, size, world, case, weights), node_group(size)
    vocabulary = shards.vocabulary()
    settings = case.budgeted_settings(vocabulary, size)
    result = solar_loss(hidden, local, vocabulary, settings, case.weight, normalizers, LANGUAGES, None, node)
    layer = t.layer[tokens].to(case.dtype).requires_grad_()
    if case.settings.pooling_tokens == "hidden_states":
        add_hidden_state_alignment(result, layer, local, case.settings, case.weight, normalizers, None, node)
    result.loss.backward()
    assert hidden.grad is not None
    start, end = vocabulary_range(case.vocab_size, case.padded_size, rank, ranks)
    gradients = {name: gradient[: end - start] for name, gradient in shards.gradients().items()}
    summed = shards.sum_losses(result)
    count = summed.soft_token_count.clamp_min(1)
    return gradients | {
        "head": gradients.get("head", gradients["embedding"]),
        "loss": summed.loss.detach(),
        "hidden": hidden.grad,
        "layer": torch.zeros_like(layer) if layer.grad is None else layer.grad,
        "tokens": tokens,
        "kept_mass": summed.kept_mass / count,
        "entropy": summed.soft_token_entropy / count,
        "count": summed.soft_token_count.to(case.dtype),
    }


def look_up_twice(world: dist.ProcessGroup, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Look up all ids before and after an update of the weights. Return both results and this rank's gradient."""
    rank, _ = rank_and_size(world)
    matrix = torch.arange(24.0).view(12, 2)
    shards, node = shards_of({"embedding": matrix}, 12, size, world, Case(())), node_group(size)
    ids = torch.arange(12).roll(rank)[: 9 + rank]

    def look_up() -> Tensor:
        return embedding_lookup(ids, shards.vocabulary().embedding, 12, node, 1.0)

    first = look_up()
    first.sum().backward()
    shards.parameters["embedding"].ds_tensor.mul_(2)  # type: ignore[attr-defined]
    shards.weights_changed()
    order = ids.argsort()
    return first[order].detach(), look_up()[order].detach(), shards.gradients()["embedding"]


def count_bytes(world: dist.ProcessGroup, size: int, tokens: int, head: Head) -> list[tuple[float, float]]:
    """Return the received bytes, in all and from other nodes, of the loss, and of the exchange between nodes."""
    rank, ranks = rank_and_size(world)
    hidden, loss_batch, _, _ = random_inputs(rank, ranks, tokens)
    normalizers = LossNormalizers(float(tokens * ranks), tokens / SEQUENCE_LENGTH / 2 * ranks)
    matrix = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    shards, node = shards_of({"embedding": matrix}, VOCAB, size, world, Case(())), node_group(size)
    with CollectiveCounter(size) as exchange:
        vocabulary = shards.vocabulary()
    settings = LossSettings(head=head, memory_budget_mb=1e6)
    with CollectiveCounter(size) as loss:
        solar_loss(hidden, loss_batch, vocabulary, settings, 1.0, normalizers, 2, None, node).loss.backward()
    with exchange:
        shards.gradients()
    return [(counter.received, counter.between_nodes) for counter in (loss, exchange)]

"""Loss and gradients of one micro-step on the ranks of this process group, with ZeRO-3. Not a test."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from data_prep.shards.format import IGNORE, PIVOT, TRANSLATION, PackedRow
from pipeline.common import distributed
from pipeline.config.recipe import load_config
from pipeline.data.micro_batch import collate, local_normalizers, take_part
from pipeline.loss import LossNormalizers
from pipeline.models.loading import load_model_config
from pipeline.training.engine_setup import build_engine
from pipeline.zero3.ds_config import deepspeed_config
from pipeline.zero3.process_group import start_process_group

LANGUAGES = ["en", "sw", "th"]
VOCAB = 59
# For each of four rows, its groups, each with the lengths of prompt and answer of the pivot and its translations. The
# second row has no pairs, the third no target tokens, and the fourth a translation without any.
GROUPS = (
    (((3, 5), (2, 4), (4, 1)), ((1, 6), (2, 2))),
    (((2, 3),), ((4, 5),)),
    (((3, 0), (2, 0)),),
    (((2, 7), (1, 0), (3, 4)),),
)


def packed_rows() -> list[PackedRow]:
    """Return the rows, with random tokens."""
    generator = np.random.default_rng(0)
    rows = []
    for number, groups in enumerate(GROUPS):
        lengths = [length for group in groups for length in group]
        ids = generator.integers(1, VOCAB, sum(map(sum, lengths))).astype(np.int32)
        is_target = np.concatenate([np.arange(prompt + answer) >= prompt for prompt, answer in lengths])
        members = [(f"{number}-{g}", m) for g, group in enumerate(groups) for m in range(len(group))]
        rows.append(
            PackedRow(
                ids,
                np.where(is_target, ids, IGNORE).astype(np.int32),
                np.array([sum(length) for length in lengths], np.int32),
                [pair_id for pair_id, _ in members],
                [LANGUAGES[member] for _, member in members],
                [TRANSLATION if member else PIVOT for _, member in members],
            )
        )
    return rows


def save_gradients(recipe: str) -> None:
    """Divide the rows between the ranks. Rank 0 saves the loss, its parts and all gradients beside the recipe."""
    config, rank, ranks = load_config(recipe, []), distributed.rank(), distributed.world_size()
    model_config = load_model_config(config.model, VOCAB)
    ds = deepspeed_config(config, ranks, model_config.hidden_size, 1)
    engine = build_engine(config, ds, model_config, VOCAB, len(LANGUAGES))
    parts = config.training.sequence_parallel_size
    groups = ranks // parts
    whole = collate(packed_rows()[rank // parts * 4 // groups :][: 4 // groups], LANGUAGES, 0, None, parts)
    (batch,) = engine.exchange_layouts([take_part(whole, rank % parts, parts)])
    local = local_normalizers([batch])
    normalizers = LossNormalizers(*distributed.all_reduce_sum([local.tokens, local.pairs], engine.device))
    evaluated = engine.evaluate(batch, normalizers)
    result = engine.forward_backward(batch, config.loss.alignment_weight, normalizers)
    assert result.loss.grad_fn is None, "the graph would stay in memory until the end of the optimizer step"
    trained = {name: p for name, p in engine.ds_engine.module.named_parameters() if p.requires_grad}
    gradients = {name: safe_get_full_grad(p) for name, p in trained.items() if name not in engine.vocabulary_names()}
    vocabulary = engine.vocabulary_shards.vocabulary()
    for name, shard in (("embedding", vocabulary.embedding), ("head", vocabulary.head)):
        if shard.grad is not None:
            gradients[name] = torch.cat(distributed.all_gather_object(shard.grad))[:VOCAB]
    sums = {"loss": result.loss, "ce_sum": result.ce_sum, "distance_sum": result.distance_sum}
    sums["eval_distance_sum"] = evaluated.distance_sum
    if rank == 0:
        torch.save(sums | gradients, Path(recipe).with_suffix(f".{ranks}.pt"))
    engine.ds_engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_process_group()
    for path in sys.argv[1:]:
        save_gradients(path)
    dist.barrier()
    distributed.shut_down()

"""A row that several ranks share gives the loss and the gradients of the whole row."""

from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from data_prep.shards.format import ShardSet
from pipeline.common.errors import UserError
from pipeline.config.settings import AdapterSettings, Config, ModelSettings, TrainingSettings
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import collate, local_normalizers, take_part
from pipeline.data.sequential_loader import SequentialLoader
from pipeline.loss import LossSettings
from pipeline.models.self_check import check_model
from pipeline.models.sequence_parallel import HeadExchange
from pipeline.training.rank_checks import check_ranks, check_sequence_parallel
from tests.conftest import Prepared
from tests.pipeline.models.sharing_ranks import gradients
from tests.pipeline.models.test_models import rows
from tests.runs import TINY
from tests.workers import Workers

ATTACHED = LossSettings(detach=(), pooling="last", head="gathered")


@pytest.mark.parametrize(
    ("family", "groups", "parts", "settings", "checkpointing", "adapter"),
    [
        ("qwen2", 1, 2, LossSettings(), False, None),
        ("qwen2", 2, 2, ATTACHED, True, None),
        ("gemma3_text", 1, 4, LossSettings(distance="infonce"), True, None),
        ("qwen2", 1, 4, LossSettings(memory_budget_mb=0.001), False, None),
        ("qwen2", 1, 2, LossSettings(pooling_tokens="hard", pooling="weights"), False, None),
        ("qwen2", 2, 2, ATTACHED, True, AdapterSettings(r=4)),
        ("qwen2", 1, 4, LossSettings(), False, AdapterSettings(r=2, use_dora=True, train_embeddings=True)),
    ],
    ids=[
        "2 ranks",
        "2 x 2 ranks, checkpointing",
        "4 ranks, sliding window, checkpointing",
        "4 ranks, many chunks",
        "2 ranks, hard tokens by weight",
        "2 x 2 ranks, LoRA, checkpointing",
        "4 ranks, DoRA",
    ],
)
def test_shared_rows_give_gradients_of_whole_rows(
    workers: Workers,
    family: str,
    groups: int,
    parts: int,
    settings: LossSettings,
    checkpointing: bool,
    adapter: AdapterSettings | None,
) -> None:
    """The model has two key-value heads, fewer than the four ranks. The rows have 16 and 13 tokens."""
    if settings.distance == "infonce":
        assert groups == 1  # its negatives are those of the micro-step
    shared = workers.run(gradients, groups * parts, family, groups, parts, settings, checkpointing, adapter)
    expected = gradients(None, family, groups, parts, settings, False, adapter)
    if adapter is not None:
        assert {name.partition("lora_")[2][:1] for name in expected} >= {"A", "B"}
    norms = {name: gradient.norm() for name, gradient in expected.items() if name != "loss"}
    total = torch.stack(list(norms.values())).norm()
    for name, value in expected.items():
        if name == "loss":
            for one in shared:
                assert float(one["loss"]) == pytest.approx(float(value), rel=1e-6)
            continue
        vocabulary = name in ("head", "embedding")
        actual = torch.cat([one[name] for one in shared]) if vocabulary else shared[0][name]
        assert (actual - value).norm() <= 1e-6 * (norms[name] + 0.1 * total), name


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_parts_cover_each_token_once(parts: int) -> None:
    whole = collate(rows(), ["en", "sw", "th"], 0, None, parts)
    taken = [take_part(whole, index, parts) for index in range(parts)]
    assert torch.equal(torch.stack([part.input_ids for part in taken], 2).flatten(1), whole.input_ids)
    assert torch.equal(torch.stack([part.position_ids for part in taken], 2).flatten(1), whole.position_ids)
    targets = sorted(
        (position * parts + index, target)
        for index, part in enumerate(taken)
        for position, target in zip(part.positions.tolist(), part.loss_batch.targets.tolist(), strict=True)
    )
    assert targets == list(zip(whole.positions.tolist(), whole.loss_batch.targets.tolist(), strict=True))
    assert local_normalizers(taken) == local_normalizers([whole])
    assert sum(part.num_tokens for part in taken) == whole.num_tokens == 29
    sizes = np.array([part.loss_batch.lengths.numpy() for part in taken])
    assert (sizes.max(0) - sizes.min(0)).max() <= 1  # so that the ranks have equal work in each chunk of the loss
    if parts == 7:
        assert (sizes == 0).any()


def test_loaders_of_sharing_ranks_read_the_same_rows(prepared: Prepared) -> None:
    """Four ranks of which two share rows read as two ranks do, and resume from the state of any of them."""
    shards = ShardSet.open(prepared.shards)
    languages = shards.manifest["languages"]
    sharing = [Loader(shards, BatchSplit(4, 1, rank, 4, 2), 5, 0) for rank in range(4)]
    for step in range(3):
        for loader in (alone := [Loader(shards, BatchSplit(4, 1, rank, 2), 5, 0) for rank in range(2)]):
            loader.load_state_dict(sharing[0].state_dict())
        batches = [loader.next() for loader in sharing]
        expected = [loader.next() for loader in alone]
        assert [len(batch) for batch in batches] == [2] * 4
        for rank, batch in enumerate(batches):
            for one, whole in zip(batch, expected[rank // 2], strict=True):
                assert one.pair_ids == whole.pair_ids and one.seq_lens[: len(whole.seq_lens) - 1] == whole.seq_lens[:-1]
                part = whole.input_ids[:, rank % 2 :: 2]
                assert torch.equal(one.input_ids[:, : part.shape[1]], part)
        counts, reference = (local_normalizers(list(chain(*some))) for some in (batches, expected))
        assert counts.pairs == reference.pairs and counts.tokens == pytest.approx(reference.tokens)
        assert {loader.consumed for loader in sharing} == {4 * (step + 1)}
    evaluation = [SequentialLoader(shards, languages, BatchSplit(4, 1, rank, 4, 2), 0) for rank in range(4)]
    assert len(evaluation[0]) == -(-len(shards) // 2)
    counts = local_normalizers([batch for loader in evaluation for batch in loader])
    reference = local_normalizers([collate(list(shards), languages, 0)])
    assert counts.pairs == reference.pairs and counts.tokens == pytest.approx(reference.tokens)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_self_check_admits_shared_rows(family: str) -> None:
    config = AutoConfig.for_model(family, **{k: v for k, v in TINY.items() if k != "model_type"}, vocab_size=61)
    check_model(config, ModelSettings(), sequence_parallel_size=4)


def test_self_check_refuses_models_that_mix_tokens_outside_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention ignore that ranks share the row, as a layer does that is not attention, such as a convolution."""
    config = AutoConfig.for_model(**TINY, vocab_size=61)
    monkeypatch.setattr(HeadExchange, "to_heads", lambda self, *tensors: tensors)
    monkeypatch.setattr(HeadExchange, "to_tokens", lambda self, x: x)
    with pytest.raises(UserError, match="the logits of a row that ranks share are not those of the whole row"):
        check_model(config, ModelSettings(), sequence_parallel_size=2)
    check_model(config, ModelSettings())


def config_of(parts: int, attention: str | None = None) -> Config:
    return Config(
        model=ModelSettings(attn_implementation=attention),
        training=TrainingSettings(sequence_parallel_size=parts),
    )


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (config_of(4, "sdpa"), {}, "4 requires model.attn_implementation solar_packed, but qwen2 uses sdpa here"),
        (config_of(2), {"model_type": "gemma2"}, "requires .* solar_packed, but gemma2 uses eager"),
        (config_of(2), {"attention_dropout": 0.1}, "requires .* solar_packed, but qwen2 uses sdpa"),
        (config_of(3), {}, "3 does not divide the 4 attention heads"),
        (config_of(8), {}, "8 does not divide the 4 attention heads"),
    ],
    ids=["sdpa", "soft cap", "dropout", "3 ranks", "more ranks than heads"],
)
def test_sequence_parallelism_refuses_models(config: Config, changes: dict, message: str) -> None:
    model_config = AutoConfig.for_model(**{**TINY, **changes})
    with pytest.raises(UserError, match=message) as caught:
        check_sequence_parallel(config, model_config)
    assert "\n" not in str(caught.value)


def test_sequence_parallelism_refuses_numbers_of_ranks() -> None:
    with pytest.raises(UserError, match="4 does not divide the number of ranks, 6; use a multiple of 4 ranks"):
        check_ranks(TrainingSettings(sequence_parallel_size=4), 24, 6)
    with pytest.raises(UserError, match=r"8 ranks / training.sequence_parallel_size 2 x .* use 2, 6 ranks"):
        check_ranks(TrainingSettings(sequence_parallel_size=2, train_batch_size=3), 24, 8)
    check_ranks(TrainingSettings(sequence_parallel_size=2, train_batch_size=3), 24, 6)

"""A split example group has the loss and the gradient of the unsplit one: the copies of its pivot count once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks
from data_prep.shards.format import PackedRow, ShardSet
from pipeline.data.micro_batch import MicroBatch, collate, local_normalizers
from pipeline.loss import LossNormalizers, LossSettings, solar_loss_reference
from pipeline.models.solar_model import decoder_hidden_states
from tests.conftest import Prepared
from tests.data_prep.packing.helpers import write_records
from tests.pipeline.data.sharded_loss import loss_gradients
from tests.runs import TINY
from tests.workers import Workers

LANGUAGES = ["en", "fr", "sw", "zh"]
SETTINGS = LossSettings(detach=())  # the alignment gradient reaches the pivot too
BOUND = 1e-7  # transformers computes norms and rotary embeddings in fp32 inside a float64 model


@pytest.fixture(scope="module")
def rows(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[PackedRow]]:
    """Pack two groups whole, and with one of them split into three parts."""
    folder = tmp_path_factory.mktemp("split")
    lengths = zip(LANGUAGES, (9, 20, 21, 22), strict=True)
    records = [("p", lang, f"{lang} 1 2", "7 " * length) for lang, length in lengths]
    records += [("q", "en", "q", "3 4"), ("q", "sw", "q", "4 3 5")]
    source = write_records(folder / "a.jsonl", *records)
    packed = {}
    for name, length in (("whole", 512), ("split", 90)):
        pack([source], str(prepared.tokenizer), folder / name, PackSettings(max_seq_length=length), Ranks())
        packed[name] = list(ShardSet.open(folder / name))
    return packed


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=600)).double()


def hidden_states(model: AutoModelForCausalLM, batch: MicroBatch) -> Tensor:
    embeddings = model.get_input_embeddings()(batch.input_ids)
    return decoder_hidden_states(model, embeddings, batch).flatten(0, 1)[batch.positions]


def dense(model: AutoModelForCausalLM, rows: list[PackedRow], weight: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute cross entropy, alignment and all gradients of CE + weight * alignment with the reference."""
    batch = collate(rows, LANGUAGES, 0)
    head = model.get_input_embeddings().weight
    loss, ce, alignment = solar_loss_reference(
        hidden_states(model, batch), head, head, batch.loss_batch, SETTINGS, weight, batch.loss_batch.normalizers()
    )
    return ce.detach(), alignment.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    difference = torch.cat([(a - e).flatten() for a, e in zip(actual, expected, strict=True)])
    return float(difference.norm() / torch.cat([e.flatten() for e in expected]).norm())


def test_split_group_matches_whole_group_in_reference(model, rows) -> None:
    assert sorted(copies for row in rows["split"] for copies in row.copies.tolist()) == [1, 1, 1, 1, 1, 3, 3, 3]
    assert all(row.copies is None for row in rows["whole"])
    for weight in (0.0, 1.0):
        whole, split = dense(model, rows["whole"], weight), dense(model, rows["split"], weight)
        assert float(split[0]) == pytest.approx(float(whole[0]), rel=BOUND)
        assert float(split[1]) == pytest.approx(float(whole[1]), rel=BOUND)
        assert relative_error(split[2], whole[2]) < BOUND
        counted_thrice = dense(model, [replace(row, copies=None) for row in rows["split"]], weight)
        assert abs(float(counted_thrice[0] / whole[0]) - 1) > 1e-4
        assert relative_error(counted_thrice[2], whole[2]) > 1e-2


@pytest.mark.parametrize("head", ["vocab_parallel", "gathered"])
def test_split_group_matches_whole_group_on_ranks(model, rows, head, workers: Workers) -> None:
    """The parts of the group are in micro-batches of two ranks."""
    ce, alignment, expected = dense(model, rows["whole"], 1.0)
    batches = [collate(rows["split"][rank::2], LANGUAGES, 0) for rank in range(2)]
    local = [local_normalizers([batch]) for batch in batches]
    normalizers = LossNormalizers(sum(n.tokens for n in local), sum(n.pairs for n in local))
    hidden = [hidden_states(model, batch) for batch in batches]
    embedding = model.get_input_embeddings().weight
    parts = workers.run(
        loss_gradients,
        2,
        [states.detach() for states in hidden],
        [batch.loss_batch for batch in batches],
        embedding.detach(),
        replace(SETTINGS, head=head),
        normalizers,
        len(LANGUAGES),
    )
    model.zero_grad()
    torch.autograd.backward(hidden, [part["hidden"] for part in parts])
    embedding.grad += torch.cat([part["head"] for part in parts])
    assert relative_error([p.grad for p in model.parameters()], expected) < BOUND
    for part in parts:
        assert float(part["loss"]) == pytest.approx(float(ce + alignment), rel=BOUND)
    batch = collate(rows["whole"], LANGUAGES, 0)
    whole = loss_gradients(
        None,
        [hidden_states(model, batch).detach()],
        [batch.loss_batch],
        embedding.detach(),
        SETTINGS,
        batch.loss_batch.normalizers(),
        len(LANGUAGES),
    )
    torch.testing.assert_close(parts[0]["language_ce"], whole["language_ce"], rtol=BOUND, atol=0)

"""Test the auxiliary losses against straightforward computations, and the shuffled pairs."""

import random

import pytest
import torch

from pipeline.data.micro_batch import collate
from pipeline.experiments.auxiliary_losses import DictionaryLoss, HardTokenLoss, MiddleLayerLoss, shuffle_pairs
from pipeline.experiments.plan import MiddleLayer
from pipeline.experiments.study import finetuning_groups
from pipeline.experiments.synthetic_benchmark import LOW, SYNTHETIC_LANGUAGES, SYNTHETIC_PIVOT, SyntheticBenchmark
from pipeline.experiments.training import pack_groups
from pipeline.loss import LossSettings, solar_loss_reference
from pipeline.models.solar_model import decoder_hidden_states
from tests.pipeline.experiments.conftest import tiny_model


@pytest.fixture(scope="module")
def benchmark() -> SyntheticBenchmark:
    return SyntheticBenchmark(11)


@pytest.fixture(scope="module")
def model(benchmark):
    return tiny_model(benchmark, layers=3).double()


@pytest.fixture
def batch(benchmark):
    groups = finetuning_groups(benchmark, 2, 2)
    random.Random(0).shuffle(groups)
    return collate(pack_groups(benchmark.build_tokenizer(), groups), list(SYNTHETIC_LANGUAGES), 3)


def test_middle_layer_loss_matches_unpacked_forward(benchmark, model, batch):
    cosine = MiddleLayerLoss(model, MiddleLayer(weight=0.5, layer=2))
    contrastive = MiddleLayerLoss(model, MiddleLayer(weight=0.5, layer=2, temperature=0.1))
    decoder_hidden_states(model, model.get_input_embeddings()(batch.input_ids), batch)
    losses = {loss: loss(model, batch) for loss in (cosine, contrastive)}

    expected, similarities, all_pivots = [], [], []
    for row, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        starts = [int(i) for i in (positions == 0).nonzero().flatten()]
        pooled = []
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            ids = row[start:end][row[start:end] != 3]
            if len(ids) == 0:
                continue
            states = model(ids[None], output_hidden_states=True).hidden_states[2][0]
            answer = int((ids == benchmark.build_tokenizer().convert_tokens_to_ids("<|assistant|>")).nonzero()[0])
            pooled.append(states[answer : len(ids) - 1].mean(0))
        expected += [1 - torch.cosine_similarity(u, pooled[0], dim=0) for u in pooled[1:]]
        similarities += [(u, len(all_pivots)) for u in pooled[1:]]
        all_pivots.append(pooled[0])
    logits = torch.stack([torch.cosine_similarity(u, torch.stack(all_pivots)) / 0.1 for u, _ in similarities])
    targets = torch.tensor([pivot for _, pivot in similarities])
    for loss, mean in (
        (cosine, torch.stack(expected).mean()),
        (contrastive, torch.nn.functional.cross_entropy(logits, targets)),
    ):
        loss.remove()
        torch.testing.assert_close(losses[loss], 0.5 * mean, rtol=1e-9, atol=1e-12)


def test_middle_layer_loss_detaches_pivots(model, batch):
    middle = MiddleLayerLoss(model, MiddleLayer(weight=1.0, layer=2))
    embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    decoder_hidden_states(model, embeddings, batch)
    middle(model, batch).backward()
    middle.remove()
    first = (batch.position_ids == 0).cumsum(1) == 1  # the pivot is the first sequence of its row
    assert embeddings.grad[first].abs().max() == 0
    assert embeddings.grad[~first].abs().max() > 0


def test_hard_token_loss_equals_loss_with_hard_tokens(model, batch):
    weights = torch.rand(len(model.get_input_embeddings().weight), dtype=torch.float64)
    matrix = model.get_input_embeddings().weight
    loss = HardTokenLoss(2.0, weights)(model, batch)
    (grad,) = torch.autograd.grad(loss, matrix)
    embedding = matrix.detach().requires_grad_()
    hidden = torch.zeros(len(batch.loss_batch.targets), matrix.shape[1], dtype=torch.float64)
    _, _, alignment = solar_loss_reference(
        hidden, torch.zeros_like(embedding), embedding, batch.loss_batch, LossSettings(pooling_tokens="hard"), 1.0,
        batch.loss_batch.normalizers(), vocabulary_weights=weights,
    )  # fmt: skip
    torch.testing.assert_close(loss, 2 * alignment)
    torch.testing.assert_close(grad, 2 * torch.autograd.grad(alignment, embedding)[0])


def test_dictionary_loss_matches_definition_and_detaches_pivots(benchmark, model, batch):
    tokenizer = benchmark.build_tokenizer()
    matrix = model.get_input_embeddings().weight
    squares, norms = [], []
    for lang in SYNTHETIC_LANGUAGES[1:]:
        for word, pivot in zip(
            benchmark.languages[lang].content_words(), benchmark.languages[SYNTHETIC_PIVOT].content_words(), strict=True
        ):
            u, v = matrix[tokenizer.convert_tokens_to_ids(word)], matrix[tokenizer.convert_tokens_to_ids(pivot)]
            squares.append(((u - v) ** 2).sum().item())
            norms.append((v**2).sum().item())
    loss = DictionaryLoss(benchmark, tokenizer, 2.0)(model, batch)
    assert loss.item() == pytest.approx(2 * (sum(squares) / len(squares)) / (sum(norms) / len(norms)))
    model.zero_grad()
    loss.backward()
    pivots = tokenizer.convert_tokens_to_ids(list(benchmark.languages[SYNTHETIC_PIVOT].content_words()))
    lows = tokenizer.convert_tokens_to_ids(list(benchmark.languages[LOW[0]].content_words()))
    assert matrix.grad[pivots].abs().max() == 0
    assert (matrix.grad[lows].abs().amax(1) > 0).all()
    model.zero_grad()


def test_shuffle_pairs_keeps_number_of_pairs_and_breaks_all(batch):
    original, shuffled = batch.loss_batch, shuffle_pairs(batch).loss_batch
    translations = original.pivot != torch.arange(len(original.pivot))
    assert shuffled.normalizers() == original.normalizers()
    assert (shuffled.pivot[~translations] == original.pivot[~translations]).all()
    assert (shuffled.pivot[translations] != original.pivot[translations]).all()
    assert sorted(shuffled.pivot[translations].unique()) == sorted(original.pivot[translations].unique())
    assert (original.problem_id[shuffled.pivot[translations]] != original.problem_id[translations]).all()
    assert (shuffled.problem_id[translations] == original.problem_id[shuffled.pivot[translations]]).all()

"""Rival, oracle and control against what they should be, written out."""

import random

import pytest
import torch

from pipeline.data.micro_batch import collate
from pipeline.experiments.auxiliary_losses import Dictionary, MiddleLayer, shuffle_pairs
from pipeline.experiments.study import finetuning_groups
from pipeline.experiments.training import pack_groups
from pipeline.experiments.world import LANGUAGES, LOW, PIVOT, World
from pipeline.models.solar_model import decode
from tests.pipeline.experiments.conftest import tiny_model


@pytest.fixture(scope="module")
def world() -> World:
    return World(11)


@pytest.fixture(scope="module")
def model(world):
    return tiny_model(world, layers=3).double()


@pytest.fixture
def batch(world):
    groups = finetuning_groups(world, 2, 2)
    random.Random(0).shuffle(groups)
    return collate(pack_groups(world.tokenizer(), groups), list(LANGUAGES), 3)


def test_middle_layer_is_the_cosine_of_mean_hidden_states_of_each_text_alone(world, model, batch):
    term = MiddleLayer(model, 0.5, layer=2)
    decode(model, model.get_input_embeddings()(batch.input_ids), batch.position_ids)
    found = term(model, batch)

    expected = []
    for row, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        starts = [int(i) for i in (positions == 0).nonzero().flatten()]
        pooled = []
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            ids = row[start:end][row[start:end] != 3]
            if len(ids) == 0:
                continue
            states = model(ids[None], output_hidden_states=True).hidden_states[2][0]
            answer = int((ids == world.tokenizer().convert_tokens_to_ids("<|assistant|>")).nonzero()[0])
            pooled.append(states[answer : len(ids) - 1].mean(0))
        expected += [1 - torch.cosine_similarity(u, pooled[0], dim=0) for u in pooled[1:]]
    term.remove()
    torch.testing.assert_close(found, 0.5 * torch.stack(expected).mean(), rtol=1e-9, atol=1e-12)


def test_middle_layer_moves_translations_and_not_pivots(model, batch):
    term = MiddleLayer(model, 1.0, layer=2)
    embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    decode(model, embeddings, batch.position_ids)
    term(model, batch).backward()
    term.remove()
    first = (batch.position_ids == 0).cumsum(1) == 1  # every row begins with its pivot
    assert embeddings.grad[first].abs().max() == 0
    assert embeddings.grad[~first].abs().max() > 0


def test_dictionary_is_the_distance_to_the_pivots_words_and_moves_only_the_others(world, model, batch):
    tokenizer = world.tokenizer()
    matrix = model.get_input_embeddings().weight
    squares, norms = [], []
    for code in LANGUAGES[1:]:
        for word, pivot in zip(
            world.languages[code].content_words(), world.languages[PIVOT].content_words(), strict=True
        ):
            u, v = matrix[tokenizer.convert_tokens_to_ids(word)], matrix[tokenizer.convert_tokens_to_ids(pivot)]
            squares.append(float(((u - v) ** 2).sum()))
            norms.append(float((v**2).sum()))
    found = Dictionary(world, tokenizer, 2.0)(model, batch)
    assert float(found) == pytest.approx(2 * (sum(squares) / len(squares)) / (sum(norms) / len(norms)))
    model.zero_grad()
    found.backward()
    pivots = tokenizer.convert_tokens_to_ids(list(world.languages[PIVOT].content_words()))
    lows = tokenizer.convert_tokens_to_ids(list(world.languages[LOW[0]].content_words()))
    assert matrix.grad[pivots].abs().max() == 0
    assert (matrix.grad[lows].abs().amax(1) > 0).all()
    model.zero_grad()


def test_shuffled_pairs_are_as_many_and_none_is_right(batch):
    right, wrong = batch.loss_batch, shuffle_pairs(batch).loss_batch
    translations = right.pivot != torch.arange(len(right.pivot))
    assert wrong.normalizers() == right.normalizers()
    assert (wrong.pivot[~translations] == right.pivot[~translations]).all()
    assert (wrong.pivot[translations] != right.pivot[translations]).all()
    assert sorted(wrong.pivot[translations].unique()) == sorted(right.pivot[translations].unique())
    assert (right.problem_id[wrong.pivot[translations]] != right.problem_id[translations]).all()
    assert (wrong.problem_id[translations] == right.problem_id[wrong.pivot[translations]]).all()

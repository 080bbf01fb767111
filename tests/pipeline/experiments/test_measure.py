"""What is measured, on planted answers and planted embeddings."""

import random

import pytest
import torch

from pipeline.experiments import measure as module
from pipeline.experiments.measure import copies_digits, draw_questions, measure, represent, respond
from pipeline.experiments.world import LANGUAGES, LOW, MID, PIVOT, World
from tests.pipeline.experiments.conftest import tiny_model


@pytest.fixture(scope="module")
def world() -> World:
    return World(5)


@pytest.fixture(scope="module")
def model(world):
    return tiny_model(world, layers=2).eval()


def test_shares_of_planted_answers(world, model, monkeypatch):
    each = 10
    asked = draw_questions(world, each, f"test {world.seed}")
    assert [sum(q.code == code for q in asked) for code in (PIVOT, *MID, *LOW)] == [60, 10, 10, 20, 20, 20]
    answers = []
    for number, question in enumerate(asked):
        words = world.tell(question.problem, question.code)[1].split()
        right = words[-1]
        if question.code in LOW and question.cells == "unseen" and number % 2:
            words[-1] = str((int(right) + 1) % 10)  # half of the unseen ones wrong
        if question.code == "low2" and question.cells == "seen":
            words[0] = world.languages[PIVOT].start  # a foreign word in a right answer
        if question.code == MID[1]:
            words = []
        answers.append(words)
    monkeypatch.setattr(module, "respond", lambda *_: answers)
    monkeypatch.setattr(module, "represent", lambda *_: {})
    found = measure(model, world.tokenizer(), world, each)
    expected = {"pivot": 1, "mid": 0.5, "low": 0.75, "low_seen": 1, "low_unseen": 0.5, "consistency": 0.75}
    assert found == pytest.approx(expected | {"confusion": 1 / 6, "confusion_pivot": 0})


def test_responses_do_not_depend_on_their_batch(world, model):
    chance = random.Random(0)
    questions = [world.tell(world.draw(chance, code, "all"), code)[0] for code in LANGUAGES for _ in range(4)]
    tokenizer = world.tokenizer()
    assert len({len(q.split()) for q in questions}) > 1
    assert respond(model, tokenizer, questions) == [respond(model, tokenizer, [q])[0] for q in questions]


def test_copies_are_right_only_with_every_digit(world, model, monkeypatch):
    def answer(model, tokenizer, questions):
        digits = [[w for w in q.split() if w.isdigit()] for q in questions]
        return [d if number % 4 else [*d[:-1], "x"] for number, d in enumerate(digits)]

    monkeypatch.setattr(module, "respond", answer)
    assert copies_digits(model, world.tokenizer(), world, 8) == dict.fromkeys(LANGUAGES, 0.75)


def test_words_that_differ_by_a_languages_offset_alone_have_cosine_one(world, model):
    tokenizer = world.tokenizer()
    before = represent(model, tokenizer, world, problems=6)
    assert abs(before["word_centred_cosine"]) < 0.5
    assert {f"{kind}_silhouette" for kind in ("middle", "final", "soft_tokens")} <= set(before)
    weight = model.get_input_embeddings().weight
    ids = {c: tokenizer.convert_tokens_to_ids(list(world.languages[c].content_words())) for c in LANGUAGES}
    with torch.no_grad():
        for number, code in enumerate(LOW):
            weight[ids[code]] = weight[ids[PIVOT]] + number
    after = represent(model, tokenizer, world, problems=6)
    assert after["word_centred_cosine"] == pytest.approx(1, abs=1e-6)

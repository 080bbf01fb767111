"""Test the measurements with planted answers and planted embeddings."""

import math
import random

import pytest
import torch

from pipeline.experiments import measure as module
from pipeline.experiments.measure import (
    BenchmarkQuestion,
    copy_accuracy,
    draw_questions,
    generate_answers,
    measure_model,
    measure_representations,
)
from pipeline.experiments.synthetic_benchmark import (
    LOW,
    MID,
    SYNTHETIC_LANGUAGES,
    SYNTHETIC_PIVOT,
    BenchmarkOptions,
    SyntheticBenchmark,
    SyntheticProblem,
    compute,
)
from tests.pipeline.experiments.conftest import tiny_model


@pytest.fixture(scope="module")
def benchmark() -> SyntheticBenchmark:
    return SyntheticBenchmark(5)


@pytest.fixture(scope="module")
def model(benchmark):
    return tiny_model(benchmark, layers=2).eval()


def test_measure_counts_planted_answers(benchmark, model, monkeypatch):
    count = 10
    questions = draw_questions(benchmark, count, f"test {benchmark.seed}")
    assert all(question.problem.is_test for question in questions)
    by_language = [sum(question.lang == lang for question in questions) for lang in (SYNTHETIC_PIVOT, *MID, *LOW)]
    assert by_language == [60, 10, 10, 20, 20, 20]
    answers = []
    for number, question in enumerate(questions):
        words = benchmark.format_problem(question.problem, question.lang)[1].split()
        if question.lang in LOW and question.combinations == "unseen" and number % 2:
            words[-1] = str((int(words[-1]) + 1) % 10)  # half of the held-out combinations are wrong
        if question.lang == "low2" and question.combinations == "seen":
            words[0] = benchmark.languages[SYNTHETIC_PIVOT].start  # a foreign word in a correct answer
        if question.lang == MID[1]:
            words = []
        answers.append(words)
    monkeypatch.setattr(module, "generate_answers", lambda *_: answers)
    monkeypatch.setattr(module, "measure_representations", lambda *_: {})
    metrics = measure_model(model, benchmark.build_tokenizer(), benchmark, count)
    expected = {"pivot": 1, "mid": 0.5, "low": 0.75, "low_seen": 1, "low_unseen": 0.5, "consistency": 0.75}
    floors = [module.floor(benchmark, question) for question in questions if question.combinations == "unseen"]
    expected["floor"] = sum(floors) / len(floors)
    assert metrics == pytest.approx(expected | {"confusion": 1 / 6, "confusion_pivot": 0})


def test_generate_answers_does_not_depend_on_batch(benchmark, model):
    rng = random.Random(0)
    problems = [(benchmark.draw_problem(rng, lang, "all"), lang) for lang in SYNTHETIC_LANGUAGES for _ in range(4)]
    questions = [benchmark.format_problem(problem, lang)[0] for problem, lang in problems]
    tokenizer = benchmark.build_tokenizer()
    assert len({len(question.split()) for question in questions}) > 1
    alone = [generate_answers(model, tokenizer, [question])[0] for question in questions]
    assert generate_answers(model, tokenizer, questions) == alone


def test_copy_accuracy_requires_every_digit(benchmark, model, monkeypatch):
    def answer(model, tokenizer, questions, max_new_tokens):
        digits = [[word for word in question.split() if word.isdigit()] for question in questions]
        return [copied if number % 4 else [*copied[:-1], "x"] for number, copied in enumerate(digits)]

    monkeypatch.setattr(module, "generate_answers", answer)
    assert copy_accuracy(model, benchmark.build_tokenizer(), benchmark, 8) == dict.fromkeys(SYNTHETIC_LANGUAGES, 0.75)


def test_floor_uses_the_seen_operator(benchmark):
    problem = SyntheticProblem(3, 0, ((0, 0, 4), (1, 1, 2)))
    seen = compute(benchmark.operators[1][0], compute(benchmark.operators[0][1], 3, 4), 2)
    question = BenchmarkQuestion("low1", "unseen", problem)
    assert module.floor(benchmark, question) == float(seen == benchmark.results(problem)[-1])
    verbs = SyntheticBenchmark(5, BenchmarkOptions(held_out="verbs"))
    assert module.floor(verbs, question) == 0.1


def test_word_centred_cosine_ignores_language_offset(benchmark, model):
    tokenizer = benchmark.build_tokenizer()
    before = measure_representations(model, tokenizer, benchmark, num_problems=6)
    assert abs(before["word_centred_cosine"]) < 0.5
    assert {f"{kind}_silhouette" for kind in ("middle", "final", "soft_tokens")} <= set(before)
    weight = model.get_input_embeddings().weight
    words = {lang: list(benchmark.languages[lang].content_words()) for lang in SYNTHETIC_LANGUAGES}
    ids = {lang: tokenizer.convert_tokens_to_ids(words[lang]) for lang in SYNTHETIC_LANGUAGES}
    with torch.no_grad():
        for number, lang in enumerate(LOW):
            weight[ids[lang]] = weight[ids[SYNTHETIC_PIVOT]] + number
    after = measure_representations(model, tokenizer, benchmark, num_problems=6)
    assert after["word_centred_cosine"] == pytest.approx(1, abs=1e-6)
    assert after["word_cosine"] < after["word_centred_cosine"]
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # the next-token distribution is uniform
    entropy = measure_representations(model, tokenizer, benchmark, num_problems=6)["soft_token_entropy"]
    assert entropy == pytest.approx(math.log(len(tokenizer)), rel=1e-5)

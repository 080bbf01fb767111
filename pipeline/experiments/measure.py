"""Evaluate a model on the synthetic benchmark: accuracy, consistency, language confusion and representations."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.generation import generate
from pipeline.experiments.synthetic_benchmark import (
    LOW,
    MID,
    SHARED_TOKENS,
    SYNTHETIC_LANGUAGES,
    SYNTHETIC_PIVOT,
    Combinations,
    SyntheticBenchmark,
    SyntheticProblem,
)
from pipeline.representations.similarity import similarity_metrics, unit_rows
from pipeline.representations.states import encode, pooled_states

# The type annotations of transformers lack a causal LM's generate() and the return types of a tokenizer.
Model = Any
Tokenizer = Any

MAX_NEW_TOKENS = 28
BATCH_SIZE = 400


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A problem in one language. `combinations` is "seen" or "unseen" in a low-resource language, otherwise "all"."""

    lang: str
    combinations: Combinations
    problem: SyntheticProblem


def draw_questions(benchmark: SyntheticBenchmark, count: int, seed: str) -> list[BenchmarkQuestion]:
    """Draw the test questions.

    Args:
        benchmark: the languages.
        count: number of questions per mid-resource language, and per low-resource language and kind of combinations.
        seed: seed of the questions.

    Returns:
        The questions in the low-resource languages, the questions in the mid-resource languages, and the low-resource
        questions translated into the pivot.
    """
    rng = random.Random(seed)

    def draw(lang: str, combinations: Combinations) -> list[BenchmarkQuestion]:
        problems = [benchmark.draw_problem(rng, lang, combinations) for _ in range(count)]
        return [BenchmarkQuestion(lang, combinations, problem) for problem in problems]

    low = [question for lang in LOW for question in (*draw(lang, "seen"), *draw(lang, "unseen"))]
    mid = [question for lang in MID for question in draw(lang, "all")]
    return [*low, *mid, *(BenchmarkQuestion(SYNTHETIC_PIVOT, "all", question.problem) for question in low)]


def generate_answers(model: Model, tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[str]]:
    """Generate a greedy response to each question and return its words."""
    examples = [
        Example(str(i), SYNTHETIC_PIVOT, [{"role": "user", "content": text}], Decimal(0))
        for i, text in enumerate(questions)
    ]
    generations = generate(model, tokenizer, examples, BATCH_SIZE, MAX_NEW_TOKENS)
    return [generation.text.split() for generation in generations]


def measure_model(model: Model, tokenizer: Tokenizer, benchmark: SyntheticBenchmark, count: int) -> dict[str, Any]:
    """Compute the metrics of a model.

    `pivot`, `mid` and `low` are the mean accuracies in these groups of languages. `consistency` is how often the answer
    in a low-resource language equals the answer in the pivot. `confusion` is how often an output contains words of
    another language. All of these are fractions in [0, 1]. The metrics of `measure_representations` are included.

    Args:
        model: model in evaluation mode.
        tokenizer: its tokenizer.
        benchmark: the languages.
        count: number of test questions, see `draw_questions`.
    """
    questions = draw_questions(benchmark, count, f"test {benchmark.seed}")
    texts = [benchmark.format_problem(question.problem, question.lang)[0] for question in questions]
    answers = generate_answers(model, tokenizer, texts)
    final = [answer[-1] if answer else None for answer in answers]
    correct = [
        word == str(benchmark.results(question.problem)[-1]) for word, question in zip(final, questions, strict=True)
    ]

    def fraction(values: Sequence[bool], lang: str, combinations: Combinations | None = None) -> float:
        return fmean(
            value
            for value, question in zip(values, questions, strict=True)
            if question.lang == lang and combinations in (None, question.combinations)
        )

    low = [i for i, question in enumerate(questions) if question.lang in LOW]
    pivots = [i for i, question in enumerate(questions) if question.lang == SYNTHETIC_PIVOT]
    same = [final[i] is not None and final[i] == final[j] for i, j in zip(low, pivots, strict=True)]
    confused = [
        bool(set(answer) & _foreign_words(benchmark, question.lang))
        for answer, question in zip(answers, questions, strict=True)
    ]
    return {
        "pivot": fraction(correct, SYNTHETIC_PIVOT),
        "mid": fmean(fraction(correct, lang) for lang in MID),
        "low": fmean(fraction(correct, lang) for lang in LOW),
        "low_seen": fmean(fraction(correct, lang, "seen") for lang in LOW),
        "low_unseen": fmean(fraction(correct, lang, "unseen") for lang in LOW),
        "consistency": fmean(same),
        "confusion": fmean(fraction(confused, lang) for lang in LOW),
        "confusion_pivot": fraction(confused, SYNTHETIC_PIVOT),
        **measure_representations(model, tokenizer, benchmark),
    }


def _foreign_words(benchmark: SyntheticBenchmark, lang: str) -> set[str]:
    return {
        word for other in SYNTHETIC_LANGUAGES if other != lang for word in benchmark.languages[other].content_words()
    }


def measure_representations(
    model: Model, tokenizer: Tokenizer, benchmark: SyntheticBenchmark, num_problems: int = 48
) -> dict[str, float]:
    """Compute the similarity to the pivot and the separability of languages for each kind of representation.

    Representations are pooled over reference solutions: at a middle layer, after the final norm, and as soft tokens.
    Cosines are means over the low-resource languages. The silhouette uses the languages as clusters.
    `word_centred_cosine` compares the input embeddings of translated words after subtracting the mean of each language.
    """
    rng = random.Random(f"representations {benchmark.seed}")
    problems = [benchmark.draw_problem(rng, SYNTHETIC_PIVOT, "all") for _ in range(num_problems)]
    records = [
        benchmark.record(str(i), lang, problem) for lang in SYNTHETIC_LANGUAGES for i, problem in enumerate(problems)
    ]
    layers = [len(model.get_decoder().layers) // 2 + 1]
    states = pooled_states(model, encode(tokenizer, records), layers, BATCH_SIZE)
    langs = np.repeat(SYNTHETIC_LANGUAGES, num_problems)
    silhouette = import_optional("sklearn.metrics").silhouette_score
    metrics: dict[str, float] = {}
    for name, points in states.items():
        kind = "middle" if name.startswith("layer") else name
        similarities = [similarity_metrics(points[langs == SYNTHETIC_PIVOT], points[langs == lang]) for lang in LOW]
        metrics[f"{kind}_cosine"] = fmean(similarity["cosine"].value for similarity in similarities)
        metrics[f"{kind}_centred_cosine"] = fmean(similarity["centred_cosine"].value for similarity in similarities)
        metrics[f"{kind}_silhouette"] = float(silhouette(unit_rows(points.astype(np.float64)), langs, metric="cosine"))
    matrix = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    words = {
        lang: matrix[tokenizer.convert_tokens_to_ids(list(benchmark.languages[lang].content_words()))]
        for lang in SYNTHETIC_LANGUAGES
    }
    metrics["word_centred_cosine"] = fmean(
        similarity_metrics(words[SYNTHETIC_PIVOT], words[lang])["centred_cosine"].value for lang in LOW
    )
    return metrics


def copy_accuracy(model: Model, tokenizer: Tokenizer, benchmark: SyntheticBenchmark, count: int) -> dict[str, float]:
    """Return, for each language, the fraction of `count` copy tasks answered with all digits correct."""
    rng = random.Random(f"copy {benchmark.seed}")
    fractions = {}
    for lang in SYNTHETIC_LANGUAGES:
        exercises = [benchmark.format_copy_task(benchmark.draw_problem(rng, lang, "all"), lang) for _ in range(count)]
        answers = generate_answers(model, tokenizer, [question for question, _ in exercises])
        digits = [[word for word in answer if word in SHARED_TOKENS and word.isdigit()] for answer in answers]
        expected = [[word for word in answer.split() if word.isdigit()] for _, answer in exercises]
        fractions[lang] = fmean(a == b for a, b in zip(digits, expected, strict=True))
    return fractions

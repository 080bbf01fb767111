"""Evaluate a model on the synthetic benchmark: accuracy, consistency, language confusion and representations."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.generation import generate
from pipeline.experiments.synthetic_benchmark import (
    LOW,
    MID,
    MODULUS,
    SHARED_TOKENS,
    SYNTHETIC_LANGUAGES,
    SYNTHETIC_PIVOT,
    Combinations,
    SyntheticBenchmark,
    SyntheticProblem,
    compute,
)
from pipeline.representations.similarity import similarity_metrics, unit_rows
from pipeline.representations.states import EncodedRecord, encode, pooled_states

# The type annotations of transformers lack a causal LM's generate() and the return types of a tokenizer.
Model = Any
Tokenizer = Any

MAX_NEW_TOKENS = {False: 28, True: 48}  # by whether words have several tokens
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
        problems = [benchmark.draw_problem(rng, lang, combinations, test=True) for _ in range(count)]
        return [BenchmarkQuestion(lang, combinations, problem) for problem in problems]

    low = [question for lang in LOW for question in (*draw(lang, "seen"), *draw(lang, "unseen"))]
    mid = [question for lang in MID for question in draw(lang, "all")]
    return [*low, *mid, *(BenchmarkQuestion(SYNTHETIC_PIVOT, "all", question.problem) for question in low)]


def generate_answers(
    model: Model, tokenizer: Tokenizer, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS[False]
) -> list[list[str]]:
    """Generate a greedy response to each question and return its words."""
    examples = [
        Example(str(i), SYNTHETIC_PIVOT, [{"role": "user", "content": text}], Decimal(0))
        for i, text in enumerate(questions)
    ]
    generations = generate(model, tokenizer, examples, BATCH_SIZE, max_new_tokens)
    return [generation.text.split() for generation in generations]


def measure_model(model: Model, tokenizer: Tokenizer, benchmark: SyntheticBenchmark, count: int) -> dict[str, Any]:
    """Compute the metrics of a model.

    `pivot`, `mid` and `low` are the mean accuracies in these groups of languages. `consistency` is how often the answer
    in a low-resource language equals the answer in the pivot. `confusion` is how often an output contains words of
    another language. `floor` is the accuracy on held-out combinations that results from always using the operator that
    the language shows for a verb. All of these are fractions in [0, 1]. The metrics of `measure_representations` are
    included.

    Args:
        model: model in evaluation mode.
        tokenizer: its tokenizer.
        benchmark: the languages.
        count: number of test questions, see `draw_questions`.
    """
    questions = draw_questions(benchmark, count, f"test {benchmark.seed}")
    texts = [benchmark.format_problem(question.problem, question.lang)[0] for question in questions]
    answers = generate_answers(model, tokenizer, texts, MAX_NEW_TOKENS[benchmark.options.split_words])
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
        "floor": fmean(floor(benchmark, question) for question in questions if question.combinations == "unseen"),
        **measure_representations(model, tokenizer, benchmark),
    }


def floor(benchmark: SyntheticBenchmark, question: BenchmarkQuestion) -> float:
    """Return whether the seen operators give the right result, or the probability of a guess if verbs are held out."""
    if benchmark.options.held_out == "verbs":
        return 1 / MODULUS
    result = question.problem.first
    for verb, noun, number in question.problem.steps:
        result = compute(benchmark.operator(verb, noun + 1), result, number)  # of the other class
    return float(result == benchmark.results(question.problem)[-1])


def _foreign_words(benchmark: SyntheticBenchmark, lang: str) -> set[str]:
    words = {word for language in benchmark.languages.values() for word in language.content_words()}
    return words - set(benchmark.languages[lang].content_words())


def measure_representations(
    model: Model, tokenizer: Tokenizer, benchmark: SyntheticBenchmark, num_problems: int = 48
) -> dict[str, float]:
    """Compute the similarity to the pivot and the separability of languages for each kind of representation.

    Representations are pooled over reference solutions: at a middle layer, after the final norm, and as soft tokens.
    Cosines are means over the low-resource languages. The silhouette uses the languages as clusters.
    `word_cosine` compares the input embeddings of translated words, which are means over the tokens of a word, and
    `word_centred_cosine` does so after subtracting the mean of each language. `soft_token_entropy` is the mean entropy
    in nats of the next-token distribution in the low-resource languages.
    """
    rng = random.Random(f"representations {benchmark.seed}")
    problems = [benchmark.draw_problem(rng, SYNTHETIC_PIVOT, "all") for _ in range(num_problems)]
    records = [
        benchmark.record(str(i), lang, problem) for lang in SYNTHETIC_LANGUAGES for i, problem in enumerate(problems)
    ]
    layers = [len(model.get_decoder().layers) // 2 + 1]
    encoded = encode(tokenizer, records)
    states = pooled_states(model, encoded, layers, BATCH_SIZE)
    langs = np.repeat(SYNTHETIC_LANGUAGES, num_problems)
    silhouette = import_optional("sklearn.metrics").silhouette_score
    metrics: dict[str, float] = {}
    for name, points in states.items():
        kind = "middle" if name.startswith("layer") else name
        similarities = [similarity_metrics(points[langs == SYNTHETIC_PIVOT], points[langs == lang]) for lang in LOW]
        metrics[f"{kind}_cosine"] = fmean(similarity["cosine"].value for similarity in similarities)
        metrics[f"{kind}_centred_cosine"] = fmean(similarity["centred_cosine"].value for similarity in similarities)
        metrics[f"{kind}_silhouette"] = float(silhouette(unit_rows(points.astype(np.float64)), langs, metric="cosine"))
    matrix = model.get_input_embeddings().weight.detach().float()
    words = {
        lang: (word_averages(tokenizer, benchmark.languages[lang].content_words()).to(matrix.device) @ matrix).cpu()
        for lang in SYNTHETIC_LANGUAGES
    }
    similarities = [similarity_metrics(words[SYNTHETIC_PIVOT].numpy(), words[lang].numpy()) for lang in LOW]
    metrics["word_cosine"] = fmean(similarity["cosine"].value for similarity in similarities)
    metrics["word_centred_cosine"] = fmean(similarity["centred_cosine"].value for similarity in similarities)
    low = [example for record, example in zip(records, encoded, strict=True) if record.lang in LOW]
    return metrics | {"soft_token_entropy": mean_entropy(model, low)}


def word_averages(tokenizer: Tokenizer, words: Sequence[str]) -> Tensor:
    """Return the [words, V] matrix that averages the embeddings of each word's tokens."""
    matrix = torch.zeros(len(words), len(tokenizer))
    for row, word in zip(matrix, words, strict=True):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        row.index_add_(0, torch.tensor(ids), torch.full((len(ids),), 1 / len(ids)))
    return matrix


@torch.inference_mode()
def mean_entropy(model: Model, encoded: Sequence[EncodedRecord]) -> float:
    """Return the mean entropy of the next-token distribution over all response positions, in nats."""
    entropies = []
    for ids, positions in encoded:
        logits = model(torch.tensor([ids], device=model.device)).logits[0, positions].float()
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().cpu())
    return float(torch.cat(entropies).mean())


def copy_accuracy(model: Model, tokenizer: Tokenizer, benchmark: SyntheticBenchmark, count: int) -> dict[str, float]:
    """Return, for each language, the fraction of `count` copy tasks answered with all digits correct."""
    rng = random.Random(f"copy {benchmark.seed}")
    fractions = {}
    for lang in SYNTHETIC_LANGUAGES:
        exercises = [benchmark.format_copy_task(benchmark.draw_problem(rng, lang, "all"), lang) for _ in range(count)]
        questions = [question for question, _ in exercises]
        answers = generate_answers(model, tokenizer, questions, MAX_NEW_TOKENS[benchmark.options.split_words])
        digits = [[word for word in answer if word in SHARED_TOKENS and word.isdigit()] for answer in answers]
        expected = [[word for word in answer.split() if word.isdigit()] for _, answer in exercises]
        fractions[lang] = fmean(a == b for a, b in zip(digits, expected, strict=True))
    return fractions

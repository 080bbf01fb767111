"""What the experiment asks of a model: accuracy on seen and unseen cells, consistency, confusion, representations."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

import numpy as np

from data_prep.records import parse_record
from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.generation import generate
from pipeline.experiments.world import LANGUAGES, LOW, MID, PIVOT, SHARED, Problem, World
from pipeline.representations.similarity import similarity_metrics, unit_rows
from pipeline.representations.states import encode, pooled_states

# transformers' annotations do not tell that a causal LM generates, nor what a tokenizer's calls return.
Model = Any
Tokenizer = Any

MAX_NEW_TOKENS = 28
BATCH = 400


@dataclass(frozen=True)
class Question:
    """A problem in one language; `cells` is seen or unseen for a low-resource language, else all."""

    code: str
    cells: str
    problem: Problem


def draw_questions(world: World, each: int, seed: str) -> list[Question]:
    """`each` problems per language and kind of cells, and the pivot asked all of the low-resource languages'."""
    chance = random.Random(seed)
    low = [
        Question(code, c, world.draw(chance, code, c)) for code in LOW for c in ("seen", "unseen") for _ in range(each)
    ]
    mid = [Question(code, "all", world.draw(chance, code, "all")) for code in MID for _ in range(each)]
    return [*low, *mid, *(Question(PIVOT, "all", q.problem) for q in low)]


def respond(model: Model, tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[str]]:
    """Greedy responses as lists of words, as `pipeline.evaluation` generates them."""
    examples = [
        Example(str(i), PIVOT, [{"role": "user", "content": text}], Decimal(0)) for i, text in enumerate(questions)
    ]
    return [generation.text.split() for generation in generate(model, tokenizer, examples, BATCH, MAX_NEW_TOKENS)]


def measure(model: Model, tokenizer: Tokenizer, world: World, each: int) -> dict[str, Any]:
    """Figures of one model; shares in [0, 1]."""
    questions = draw_questions(world, each, f"test {world.seed}")
    words = respond(model, tokenizer, [world.tell(q.problem, q.code)[0] for q in questions])
    final = [answer[-1] if answer else None for answer in words]
    right = [word == str(world.numbers(q.problem)[-1]) for word, q in zip(final, questions, strict=True)]

    def share(values: Sequence[bool], code: str, cells: str | None = None) -> float:
        chosen = [v for v, q in zip(values, questions, strict=True) if q.code == code and cells in (None, q.cells)]
        return fmean(chosen)

    low = [i for i, q in enumerate(questions) if q.code in LOW]
    pivots = [i for i, q in enumerate(questions) if q.code == PIVOT]
    same = [final[i] is not None and final[i] == final[j] for i, j in zip(low, pivots, strict=True)]
    foreign = [bool(set(answer) & _foreign_words(world, q.code)) for answer, q in zip(words, questions, strict=True)]
    return {
        "pivot": share(right, PIVOT),
        "mid": fmean(share(right, code) for code in MID),
        "low": fmean(share(right, code) for code in LOW),
        "low_seen": fmean(share(right, code, "seen") for code in LOW),
        "low_unseen": fmean(share(right, code, "unseen") for code in LOW),
        "consistency": fmean(same),
        "confusion": fmean(share(foreign, code) for code in LOW),
        "confusion_pivot": share(foreign, PIVOT),
        **represent(model, tokenizer, world),
    }


def _foreign_words(world: World, code: str) -> set[str]:
    return {word for other in LANGUAGES if other != code for word in world.languages[other].content_words()}


def represent(model: Model, tokenizer: Tokenizer, world: World, problems: int = 48) -> dict[str, float]:
    """Of written-out answers: cosines low-resource to pivot and silhouette by language, final layer and soft tokens.

    `word_centred_cosine`: of the input embeddings of translated words, each language's mean taken off.
    """
    chance = random.Random(f"representations {world.seed}")
    drawn = [(str(i), world.draw(chance, PIVOT, "all")) for i in range(problems)]
    asked = [parse_record(world.record(i, code, problem)) for code in LANGUAGES for i, problem in drawn]
    layers = [len(model.get_decoder().layers) // 2 + 1]
    states = pooled_states(model, encode(tokenizer, asked), layers, BATCH)
    names = np.repeat(LANGUAGES, problems)
    silhouette = import_optional("sklearn.metrics").silhouette_score
    figures: dict[str, float] = {}
    for name, points in states.items():
        kind = "middle" if name.startswith("layer") else name
        found = [similarity_metrics(points[names == PIVOT], points[names == code]) for code in LOW]
        figures[f"{kind}_cosine"] = fmean(f["cosine"].value for f in found)
        figures[f"{kind}_centred_cosine"] = fmean(f["centred_cosine"].value for f in found)
        figures[f"{kind}_silhouette"] = float(silhouette(unit_rows(points.astype(np.float64)), names, metric="cosine"))
    matrix = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    found_words = {
        code: matrix[tokenizer.convert_tokens_to_ids(list(world.languages[code].content_words()))] for code in LANGUAGES
    }
    figures["word_centred_cosine"] = fmean(
        similarity_metrics(found_words[PIVOT], found_words[code])["centred_cosine"].value for code in LOW
    )
    return figures


def copies_digits(model: Model, tokenizer: Tokenizer, world: World, each: int) -> dict[str, float]:
    """Share of copy exercises whose digits are all right, by language: the first gate."""
    chance = random.Random(f"copy {world.seed}")
    shares = {}
    for code in LANGUAGES:
        told = [world.copy(world.draw(chance, code, "all"), code) for _ in range(each)]
        words = respond(model, tokenizer, [question for question, _ in told])
        digits = [[w for w in answer if w in SHARED and w.isdigit()] for answer in words]
        wanted = [[w for w in answer.split() if w.isdigit()] for _, answer in told]
        shares[code] = fmean(a == b for a, b in zip(digits, wanted, strict=True))
    return shares

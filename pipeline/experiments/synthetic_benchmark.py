"""Synthetic benchmark of parallel word problems in six languages, some of which can only be solved by transfer.

The operation of a step depends on its verb and on which of two classes its noun belongs to. The data in the pivot and
the mid-resource languages contain every combination of verb and class. The data in a low-resource language contain each
verb with only one class, so the other half of each verb's meaning can only be learned from the other languages. Words
and word orders differ between languages. Digits and operators are shared.
"""

import random
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Literal

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.records import Record, parse_record
from data_prep.tokenization.sentencepiece_models import CHAT_TEMPLATE, ROLES

SYNTHETIC_PIVOT = "pivot"
MID = ("mid1", "mid2")
LOW = ("low1", "low2", "low3")
SYNTHETIC_LANGUAGES = (SYNTHETIC_PIVOT, *MID, *LOW)
MODULUS = 10
OPERATORS = ("+", "-", "~", "*")  # plus, minus, minus with swapped operands, times (all modulo 10)
NUM_VERBS, NUM_NOUNS, NUM_CLASSES = 12, 8, 2
NUM_STEPS = (1, 2)
SHARED_TOKENS = (*map(str, range(MODULUS)), *OPERATORS, "=", ".")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", *ROLES)

# Combinations of verb and class: all, those in the training data of a language, or those held out of it.
Combinations = Literal["all", "seen", "unseen"]


def compute(operator: str, a: int, b: int) -> int:
    """Return the result of one step."""
    results = {"+": a + b, "-": a - b, "~": b - a, "*": a * b}
    return results[operator] % MODULUS


@dataclass(frozen=True)
class SyntheticLanguage:
    """Words and word orders of a language.

    Attributes:
        verbs, nouns: the words, ordered by meaning.
        start, ask, copy, answer: words that start a problem, ask for its result, ask for a copy, and start the result.
        question_order: order of verb, noun and number in a question.
        solution_order: order of verb and noun in a solution.
    """

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    start: str
    ask: str
    copy: str
    answer: str
    question_order: tuple[int, ...]
    solution_order: tuple[int, ...]

    def content_words(self) -> tuple[str, ...]:
        """Return all words, ordered by meaning. The order is the same in all languages."""
        return (*self.verbs, *self.nouns, self.start, self.ask, self.copy, self.answer)

    def clause(self, verb: int, noun: int, number: int | None) -> str:
        """Format one step, with its number (as in a question) or without (as in a solution)."""
        parts = [self.verbs[verb], self.nouns[noun]] + ([] if number is None else [str(number)])
        order = self.question_order if number is not None else self.solution_order
        return " ".join(parts[i] for i in order)


@dataclass(frozen=True)
class SyntheticProblem:
    """A word problem: the first number with its noun, and the (verb, noun, number) of each step.

    The first noun does not affect the result. Without it, a low-resource language would contain each noun only with the
    verbs of its class, and no amount of text could separate the meanings of nouns and verbs.
    """

    first: int
    noun: int
    steps: tuple[tuple[int, int, int], ...]


class SyntheticBenchmark:
    """Languages, meanings and problems, all generated from one seed.

    Attributes:
        seed: the seed.
        languages: the languages by code.
        operators: operator of a step, indexed by [verb][class].
        seen_class: for each low-resource language, the class with which each verb occurs in its training data.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._rng = random.Random(f"world {seed}")
        words = self._draw_words()
        self.languages = {lang: self._draw_language(words) for lang in SYNTHETIC_LANGUAGES}
        # The operators of a verb differ between classes, so that the seen one does not reveal the unseen one.
        self.operators = [self._rng.sample(OPERATORS, NUM_CLASSES) for _ in range(NUM_VERBS)]
        self.seen_class = {lang: [self._rng.randrange(NUM_CLASSES) for _ in range(NUM_VERBS)] for lang in LOW}

    def _draw_words(self) -> list[str]:
        """Return pronounceable words for all languages, without duplicates."""
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        per_language = NUM_VERBS + NUM_NOUNS + 4
        words: set[str] = set()
        while len(words) < per_language * len(SYNTHETIC_LANGUAGES):
            words.add("".join(self._rng.choices(syllables, k=3)))
        shuffled = sorted(words)
        self._rng.shuffle(shuffled)
        return shuffled

    def _draw_language(self, words: list[str]) -> SyntheticLanguage:
        """Pop the words of one language from `words` and draw its word orders."""
        own = [words.pop() for _ in range(NUM_VERBS + NUM_NOUNS + 4)]
        verbs, nouns = tuple(own[:NUM_VERBS]), tuple(own[NUM_VERBS : NUM_VERBS + NUM_NOUNS])
        start, ask, copy, answer = own[NUM_VERBS + NUM_NOUNS :]
        question_order = self._rng.choice(list(permutations(range(3))))
        solution_order = self._rng.choice(list(permutations(range(2))))
        return SyntheticLanguage(verbs, nouns, start, ask, copy, answer, question_order, solution_order)

    def operator(self, verb: int, noun: int) -> str:
        """Return the operator of a step."""
        return self.operators[verb][noun % NUM_CLASSES]

    def results(self, problem: SyntheticProblem) -> list[int]:
        """Return the first number and the result of each step."""
        results = [problem.first]
        for verb, noun, number in problem.steps:
            results.append(compute(self.operator(verb, noun), results[-1], number))
        return results

    def draw_problem(self, rng: random.Random, lang: str, combinations: Combinations) -> SyntheticProblem:
        """Draw a problem.

        Args:
            rng: random number generator.
            lang: language whose training data determine which combinations are seen.
            combinations: combinations of verb and class that the problem may use. Ignored for languages not in `LOW`.
        """
        steps = []
        for _ in range(rng.choice(NUM_STEPS)):
            verb, noun = rng.randrange(NUM_VERBS), rng.randrange(NUM_NOUNS)
            if combinations != "all" and lang in LOW:
                seen = self.seen_class[lang][verb]
                noun = noun - noun % NUM_CLASSES + (seen if combinations == "seen" else 1 - seen)
            steps.append((verb, noun, rng.randrange(MODULUS)))
        return SyntheticProblem(rng.randrange(MODULUS), rng.randrange(NUM_NOUNS), tuple(steps))

    def format_problem(self, problem: SyntheticProblem, lang: str) -> tuple[str, str]:
        """Format a problem as question and worked solution in one language."""
        language, results = self.languages[lang], self.results(problem)
        solved = []
        for (verb, noun, number), (before, after) in zip(problem.steps, pairwise(results), strict=True):
            calculation = f"{before} {self.operator(verb, noun)} {number} = {after} ."
            solved.append(f"{language.clause(verb, noun, None)} {calculation}")
        solution = [_format_start(problem, language), *solved, f"{language.answer} {results[-1]}"]
        return _format_question(problem, language, language.ask), " ".join(solution)

    def format_copy_task(self, problem: SyntheticProblem, lang: str) -> tuple[str, str]:
        """Format a task to repeat the problem as question and answer. It requires words and digits but no meaning."""
        language = self.languages[lang]
        copied = [f"{language.clause(verb, noun, None)} {number} ." for verb, noun, number in problem.steps]
        answer = " ".join([_format_start(problem, language), *copied])
        return _format_question(problem, language, language.copy), answer

    def record(self, pair_id: str, lang: str, problem: SyntheticProblem, copied: bool = False) -> Record:
        """Return the training record of a problem, or of its copy task, in one language."""
        question, answer = self.format_copy_task(problem, lang) if copied else self.format_problem(problem, lang)
        return parse_record({"pair_id": pair_id, "lang": lang, "question": question, "answer": answer})

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one token per word and the chat template of `python -m data_prep tokenizer`."""
        words = [word for language in self.languages.values() for word in language.content_words()]
        vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *SHARED_TOKENS, *words])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # type: ignore[call-arg]
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[call-arg]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES)})
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer


def _format_question(problem: SyntheticProblem, language: SyntheticLanguage, end: str) -> str:
    clauses = [f"{language.clause(*step)} ." for step in problem.steps]
    return " ".join([_format_start(problem, language), *clauses, end])


def _format_start(problem: SyntheticProblem, language: SyntheticLanguage) -> str:
    return f"{language.start} {language.nouns[problem.noun]} {problem.first} ."

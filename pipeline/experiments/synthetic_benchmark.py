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
from zlib import crc32

from transformers import PreTrainedTokenizerFast

from data_prep.records import Record, parse_record
from pipeline.experiments.synthetic_language import SyntheticLanguage
from pipeline.experiments.synthetic_tokenizer import WORD_START, build_tokenizer

SYNTHETIC_PIVOT = "pivot"
MID = ("mid1", "mid2")
LOW = ("low1", "low2", "low3")
SYNTHETIC_LANGUAGES = (SYNTHETIC_PIVOT, *MID, *LOW)
MODULUS = 10
OPERATORS = ("+", "-", "~", "*")  # plus, minus, minus with swapped operands, times (all modulo 10)
NUM_VERBS, NUM_NOUNS, NUM_CLASSES = 12, 8, 2
NUM_STEPS = (1, 2)
TEST_FRACTION = 5  # one of this number of problems is never trained on, by a hash of the problem
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
ENDINGS = SYLLABLES[::7]
STEM_LENGTH = 4  # two syllables
SHARED_TOKENS = (*map(str, range(MODULUS)), *OPERATORS, "=", ".")

# Combinations of verb and class: all, those in the training data of a language, or those held out of it.
Combinations = Literal["all", "seen", "unseen"]
Task = Literal["solve", "copy", "translate"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """Properties in which versions of the benchmark differ.

    Attributes:
        subwords: whether a token is a syllable, with a marker if it begins a word. A word then has three tokens, and
            all languages share them. Otherwise each word is a token.
        own_syllables: whether each language has syllables of its own, as with a script of its own.
        stems: whether a word has two tokens: a stem that no other word has, and an ending that words of all languages
            share.
        restate: whether the worked answer repeats the verb and noun of each step before computing it. Otherwise it
            contains no word but the one that starts the result.
        held_out: what the training data of a low-resource language lack: for each verb one of the two classes, or half
            of the verbs (`verbs`), for which then no translation pair exists.
        synonyms: number of words per verb and noun in each language. The n-th one is used with a frequency
            proportional to 1/n, independently in each language, so that translation is many to many.
        paraphrase: whether the answer draws its synonyms anew. Its next word is then uncertain. Otherwise it repeats
            the words of the question.
        shared_nouns: number of nouns that are the same word in all languages, like names.
        zipf: whether the n-th verb or noun occurs with a frequency proportional to 1/n, otherwise all equally often.
    """

    subwords: bool = False
    own_syllables: bool = False
    stems: bool = False
    restate: bool = True
    held_out: Literal["classes", "verbs"] = "classes"
    synonyms: int = 1
    paraphrase: bool = False
    shared_nouns: int = 0
    zipf: bool = False

    @property
    def split_words(self) -> bool:
        """Whether words have several tokens."""
        return self.subwords or self.stems


def draw_rank(rng: random.Random, number: int) -> int:
    """Draw an index below `number` by Zipf's law: the n-th one with a probability proportional to 1/n."""
    return rng.choices(range(number), [1 / (n + 1) for n in range(number)])[0]


def compute(operator: str, a: int, b: int) -> int:
    """Return the result of one step."""
    results = {"+": a + b, "-": a - b, "~": b - a, "*": a * b}
    return results[operator] % MODULUS


@dataclass(frozen=True)
class SyntheticProblem:
    """A word problem: the first number with its noun, and the (verb, noun, number) of each step.

    The first noun does not affect the result. Without it, a low-resource language would contain each noun only with the
    verbs of its class, and no amount of text could separate the meanings of nouns and verbs.
    """

    first: int
    noun: int
    steps: tuple[tuple[int, int, int], ...]

    @property
    def is_test(self) -> bool:
        """Whether the problem is used for tests only. No training data contain it, in any language."""
        return crc32(repr((self.first, self.noun, self.steps)).encode()) % TEST_FRACTION == 0


class SyntheticBenchmark:
    """Languages, meanings and problems, all generated from one seed.

    Attributes:
        seed: the seed.
        languages: the languages by code.
        operators: operator of a step, indexed by [verb][class].
        options: the options.
        seen_class: for each low-resource language, the class with which each verb occurs in its training data.
        seen_verbs: for each low-resource language, half of the verbs. With `held_out: verbs`, its training data contain
            only these.
    """

    def __init__(self, seed: int, options: BenchmarkOptions | None = None) -> None:
        self.seed, self.options = seed, options or BenchmarkOptions()
        self._rng = random.Random(f"world {seed}")
        words = self._draw_words(SYLLABLES, self._num_words * len(SYNTHETIC_LANGUAGES))
        if self.options.own_syllables:
            inventories = [SYLLABLES[i :: len(SYNTHETIC_LANGUAGES)] for i in range(len(SYNTHETIC_LANGUAGES))]
            words = [word for own in inventories for word in self._draw_words(own, self._num_words)]
        if self.options.stems:
            stems = self._draw_words(SYLLABLES, self._num_words * len(SYNTHETIC_LANGUAGES), num_syllables=2)
            words = [stem + self._rng.choice(ENDINGS) for stem in stems]
        self._shared_nouns: tuple[str, ...] = ()
        self.languages = {lang: self._draw_language(words) for lang in SYNTHETIC_LANGUAGES}
        # The operators of a verb differ between classes, so that the seen one does not reveal the unseen one.
        self.operators = [self._rng.sample(OPERATORS, NUM_CLASSES) for _ in range(NUM_VERBS)]
        self.seen_class = {lang: [self._rng.randrange(NUM_CLASSES) for _ in range(NUM_VERBS)] for lang in LOW}
        self.seen_verbs = {lang: sorted(self._rng.sample(range(NUM_VERBS), NUM_VERBS // 2)) for lang in LOW}

    def _draw_words(self, syllables: list[str], number: int, num_syllables: int = 3) -> list[str]:
        """Return pronounceable words without duplicates."""
        words: set[str] = set()
        while len(words) < number:
            words.add("".join(self._rng.choices(syllables, k=num_syllables)))
        shuffled = sorted(words)
        self._rng.shuffle(shuffled)
        return shuffled

    @property
    def _num_words(self) -> int:
        """Number of words of a language."""
        return (NUM_VERBS + NUM_NOUNS) * self.options.synonyms + 4

    def _draw_language(self, words: list[str]) -> SyntheticLanguage:
        """Pop the words of one language from `words` and draw its word orders."""
        own = [words.pop() for _ in range(self._num_words)]
        num_verbs, num_nouns = NUM_VERBS * self.options.synonyms, NUM_NOUNS * self.options.synonyms
        verbs, nouns = tuple(own[:num_verbs]), tuple(own[num_verbs : num_verbs + num_nouns])
        shared = self.options.shared_nouns * self.options.synonyms
        self._shared_nouns = self._shared_nouns or nouns[:shared]
        start, ask, copy, answer = own[num_verbs + num_nouns :]
        question_order = self._rng.choice(list(permutations(range(3))))
        solution_order = self._rng.choice(list(permutations(range(2))))
        nouns = (*self._shared_nouns, *nouns[shared:])
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

    def draw_problem(
        self, rng: random.Random, lang: str, combinations: Combinations, test: bool = False
    ) -> SyntheticProblem:
        """Draw a problem.

        Args:
            rng: random number generator.
            lang: language whose training data determine which combinations are seen.
            combinations: combinations of verb and class that the problem may use. Ignored for languages not in `LOW`.
            test: whether to draw a test problem or a training problem. No problem is both.
        """
        while True:
            steps = tuple(self._draw_step(rng, lang, combinations) for _ in range(rng.choice(NUM_STEPS)))
            problem = SyntheticProblem(rng.randrange(MODULUS), self._draw_meaning(rng, NUM_NOUNS), steps)
            if problem.is_test is test:
                return problem

    def _draw_meaning(self, rng: random.Random, number: int) -> int:
        return draw_rank(rng, number) if self.options.zipf else rng.randrange(number)

    def _draw_step(self, rng: random.Random, lang: str, combinations: Combinations) -> tuple[int, int, int]:
        verb, noun = self._draw_meaning(rng, NUM_VERBS), self._draw_meaning(rng, NUM_NOUNS)
        if combinations != "all" and lang in LOW:
            if self.options.held_out == "verbs":
                verbs = [v for v in range(NUM_VERBS) if (v in self.seen_verbs[lang]) is (combinations == "seen")]
                verb = verbs[verb % len(verbs)]
            else:
                seen = self.seen_class[lang][verb]
                noun = noun - noun % NUM_CLASSES + (seen if combinations == "seen" else 1 - seen)
        return verb, noun, rng.randrange(MODULUS)

    def _word_indices(
        self, problem: SyntheticProblem, lang: str, paraphrase: bool = False
    ) -> tuple[int, list[tuple[int, int]]]:
        """Return the word of the first noun, and the words of verb and noun of each step.

        `paraphrase` draws other synonyms than those of the question.
        """
        synonyms = self.options.synonyms
        rng = random.Random(f"synonyms {self.seed} {lang} {problem}{' answer' * paraphrase}")

        def word(meaning: int) -> int:
            return meaning * synonyms + (draw_rank(rng, synonyms) if synonyms > 1 else 0)

        return word(problem.noun), [(word(verb), word(noun)) for verb, noun, _ in problem.steps]

    def format_question(self, problem: SyntheticProblem, lang: str, end: str) -> str:
        """Format a problem as a question in one language. `end`: the last word, which says what to do."""
        language, (noun, steps) = self.languages[lang], self._word_indices(problem, lang)
        numbers = [number for *_, number in problem.steps]
        clauses = [f"{language.clause(*step, number)} ." for step, number in zip(steps, numbers, strict=True)]
        return " ".join([f"{language.start} {language.nouns[noun]} {problem.first} .", *clauses, end])

    def format_problem(self, problem: SyntheticProblem, lang: str) -> tuple[str, str]:
        """Format a problem as question and worked solution in one language."""
        language, results = self.languages[lang], self.results(problem)
        noun, words = self._word_indices(problem, lang, self.options.paraphrase)
        solution = [f"{language.start} {language.nouns[noun]} {problem.first} ."] if self.options.restate else []
        for (verb, step_noun, number), step, (before, after) in zip(
            problem.steps, words, pairwise(results), strict=True
        ):
            calculation = f"{before} {self.operator(verb, step_noun)} {number} = {after} ."
            solution.append(f"{language.clause(*step, None)} {calculation}" if self.options.restate else calculation)
        solution.append(f"{language.answer} {results[-1]}")
        return self.format_question(problem, lang, language.ask), " ".join(solution)

    def format_copy_task(self, problem: SyntheticProblem, lang: str) -> tuple[str, str]:
        """Return the question and the answer of a task that asks to repeat the problem.

        It requires the words and the digits, but not their meaning.
        """
        language, (noun, steps) = self.languages[lang], self._word_indices(problem, lang)
        copied = [
            f"{language.clause(*step, None)} {number} ."
            for step, (*_, number) in zip(steps, problem.steps, strict=True)
        ]
        answer = " ".join([f"{language.start} {language.nouns[noun]} {problem.first} .", *copied])
        return self.format_question(problem, lang, language.copy), answer

    def format_translation_task(self, problem: SyntheticProblem, lang: str) -> tuple[str, str]:
        """Format a task to translate the question into the pivot, which the pivot's word for copying asks for."""
        pivot = self.languages[SYNTHETIC_PIVOT]
        question = self.format_question(problem, lang, pivot.copy)
        return question, self.format_question(problem, SYNTHETIC_PIVOT, pivot.ask)

    def record(self, pair_id: str, lang: str, problem: SyntheticProblem, task: Task = "solve") -> Record:
        """Return the training record of a task in one language."""
        formats = {
            "solve": self.format_problem, "copy": self.format_copy_task, "translate": self.format_translation_task
        }  # fmt: skip
        question, answer = formats[task](problem, lang)
        return parse_record({"pair_id": pair_id, "lang": lang, "question": question, "answer": answer})

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer of words, of syllables with `subwords`, or of stems and endings with `stems`."""
        words = dict.fromkeys(word for language in self.languages.values() for word in language.content_words())
        if self.options.subwords:
            marked = [WORD_START + piece for piece in (*SHARED_TOKENS, *SYLLABLES)]
            return build_tokenizer([*marked, *SYLLABLES], first_syllables=1)
        if self.options.stems:
            marked = [WORD_START + piece for piece in (*SHARED_TOKENS, *(word[:STEM_LENGTH] for word in words))]
            return build_tokenizer([*marked, *ENDINGS], first_syllables=2)
        return build_tokenizer([*SHARED_TOKENS, *words])

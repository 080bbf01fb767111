"""A made-up world of parallel word problems in six languages, in which some knowledge can only come by transfer.

What a step computes depends on its verb and on the class of its noun. The pivot and the mid-resource languages show
every (verb, class); each low-resource language shows each verb with one class only. The other half of what its verbs
mean can reach it from the other languages alone. Words and word orders differ between languages; digits and signs
are shared.
"""

import random
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.tokenization.tokenizer import CHAT_TEMPLATE, ROLES

PIVOT = "pivot"
MID = ("mid1", "mid2")
LOW = ("low1", "low2", "low3")
LANGUAGES = (PIVOT, *MID, *LOW)
MODULUS = 10
SIGNS = ("+", "-", "~", "*")  # plus, minus, minus the other way round, times; all modulo 10
VERBS, NOUNS, CLASSES = 12, 8, 2
STEPS = (1, 2)
SHARED = (*map(str, range(MODULUS)), *SIGNS, "=", ".")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", *ROLES)

Cells = Literal["all", "seen", "unseen"]


def compute(sign: str, a: int, b: int) -> int:
    """One step of a calculation."""
    results = {"+": a + b, "-": a - b, "~": b - a, "*": a * b}
    return results[sign] % MODULUS


@dataclass(frozen=True)
class Language:
    """Words by meaning, and the orders of verb, noun and number when a problem is told and when it is solved."""

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    start: str
    ask: str
    copy: str
    answer: str
    told: tuple[int, ...]
    solved: tuple[int, ...]

    def content_words(self) -> tuple[str, ...]:
        """In one order for all languages."""
        return (*self.verbs, *self.nouns, self.start, self.ask, self.copy, self.answer)

    def clause(self, verb: int, noun: int, number: int | None) -> str:
        """Told with a number, solved without."""
        parts = [self.verbs[verb], self.nouns[noun]] + ([] if number is None else [str(number)])
        order = self.told if number is not None else self.solved
        return " ".join(parts[i] for i in order)


@dataclass(frozen=True)
class Problem:
    """A first number and its noun, then verb, noun and number of each step.

    The first noun counts for nothing. Without it a low-resource language would name each noun only beside verbs of
    its class, and no amount of text could tell what belongs to the nouns of a class from what belongs to their verbs.
    """

    first: int
    noun: int
    steps: tuple[tuple[int, int, int], ...]


class World:
    """Languages, meanings and problems, all decided by one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(f"world {seed}")
        words = self._words()
        self.languages = {code: self._language(words) for code in LANGUAGES}
        # Never the same sign for both classes: a verb's other half cannot be guessed from the half that is seen.
        self.signs = [self.random.sample(SIGNS, CLASSES) for _ in range(VERBS)]
        self.seen_class = {code: [self.random.randrange(CLASSES) for _ in range(VERBS)] for code in LOW}

    def _words(self) -> list[str]:
        """Pronounceable and all different."""
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        each = VERBS + NOUNS + 4
        words: set[str] = set()
        while len(words) < each * len(LANGUAGES):
            words.add("".join(self.random.choices(syllables, k=3)))
        shuffled = sorted(words)
        self.random.shuffle(shuffled)
        return shuffled

    def _language(self, words: list[str]) -> Language:
        take = [words.pop() for _ in range(VERBS + NOUNS + 4)]
        start, ask, copy, answer = take[VERBS + NOUNS :]
        told = self.random.choice(list(permutations(range(3))))
        solved = self.random.choice(list(permutations(range(2))))
        return Language(tuple(take[:VERBS]), tuple(take[VERBS : VERBS + NOUNS]), start, ask, copy, answer, told, solved)

    def sign(self, verb: int, noun: int) -> str:
        return self.signs[verb][noun % CLASSES]

    def numbers(self, problem: Problem) -> list[int]:
        """The number at first and after each step."""
        found = [problem.first]
        for verb, noun, number in problem.steps:
            found.append(compute(self.sign(verb, noun), found[-1], number))
        return found

    def draw(self, chance: random.Random, code: str, cells: Cells) -> Problem:
        """A problem whose (verb, class) cells are all seen in the language's training data, all unseen, or any."""
        steps = []
        for _ in range(chance.choice(STEPS)):
            verb, noun = chance.randrange(VERBS), chance.randrange(NOUNS)
            if cells != "all" and code in LOW:
                wanted = self.seen_class[code][verb] if cells == "seen" else 1 - self.seen_class[code][verb]
                noun = noun - noun % CLASSES + wanted
            steps.append((verb, noun, chance.randrange(MODULUS)))
        return Problem(chance.randrange(MODULUS), chance.randrange(NOUNS), tuple(steps))

    def tell(self, problem: Problem, code: str) -> tuple[str, str]:
        """Question and worked answer in one language."""
        speaks, numbers = self.languages[code], self.numbers(problem)
        solved = [
            f"{speaks.clause(verb, noun, None)} {numbers[i]} {self.sign(verb, noun)} {number} = {numbers[i + 1]} ."
            for i, (verb, noun, number) in enumerate(problem.steps)
        ]
        answer = [self._begin(problem, code), *solved, f"{speaks.answer} {numbers[-1]}"]
        return self._ask(problem, code, speaks.ask), " ".join(answer)

    def copy(self, problem: Problem, code: str) -> tuple[str, str]:
        """An exercise that needs the language's words and the digits but no meaning: say what was told."""
        speaks = self.languages[code]
        said = [f"{speaks.clause(verb, noun, None)} {number} ." for verb, noun, number in problem.steps]
        return self._ask(problem, code, speaks.copy), " ".join([self._begin(problem, code), *said])

    def record(self, pair_id: str, code: str, problem: Problem, copied: bool = False) -> dict[str, Any]:
        """The canonical record of a problem, solved or copied, in one language."""
        question, answer = self.copy(problem, code) if copied else self.tell(problem, code)
        return {"pair_id": pair_id, "lang": code, "question": question, "answer": answer}

    def _ask(self, problem: Problem, code: str, end: str) -> str:
        told = [f"{self.languages[code].clause(*step)} ." for step in problem.steps]
        return " ".join([self._begin(problem, code), *told, end])

    def _begin(self, problem: Problem, code: str) -> str:
        speaks = self.languages[code]
        return f"{speaks.start} {speaks.nouns[problem.noun]} {problem.first} ."

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word, with the chat template of `data_prep tokenizer`."""
        words = [word for language in self.languages.values() for word in language.content_words()]
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *SHARED, *words])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # type: ignore[call-arg]
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[call-arg]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES)})
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

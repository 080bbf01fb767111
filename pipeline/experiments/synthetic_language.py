"""A language of the synthetic benchmark: its words and word orders."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SyntheticLanguage:
    """Words and word orders of a language.

    Attributes:
        verbs, nouns: the words, ordered by meaning. Synonyms follow each other.
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
        """Format one step, with its number (as in a question) or without (as in a solution).

        `verb` and `noun` are indices of words.
        """
        parts = [self.verbs[verb], self.nouns[noun]] + ([] if number is None else [str(number)])
        order = self.question_order if number is not None else self.solution_order
        return " ".join(parts[i] for i in order)

"""Sample text for tokenizer training, with small languages oversampled."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.records import message_texts, read_records
from pipeline.common.errors import UserError


def sample_texts(paths: list[Path], alpha: float, max_characters: int) -> Iterator[str]:
    """Yield message texts from canonical files, with languages in proportion to their size ** alpha.

    A language with n characters gets a fraction of the sampled characters proportional to n ** alpha. An alpha of 1
    keeps the original proportions, and 0 gives all languages the same amount. The texts of a language are sampled
    evenly, and repeated if it has less text than its fraction requires. The files are read twice and never held in
    memory.

    Args:
        paths: JSON Lines and Parquet files of canonical records.
        alpha: Exponent in [0, 1].
        max_characters: Approximate number of characters to sample, at most the number in the files.

    Raises:
        UserError: A record is malformed, or alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha must be in [0, 1], not {alpha}")
    sizes: Counter = Counter()
    for lang, text in _texts(paths):
        sizes[lang] += len(text)
    budget = min(max_characters, sizes.total())
    weights = {lang: size**alpha for lang, size in sizes.items()}
    rates = {lang: budget * weights[lang] / sum(weights.values()) / size for lang, size in sizes.items() if size}
    credit: Counter = Counter()
    for lang, text in _texts(paths):
        credit[lang] += rates.get(lang, 0)
        while credit[lang] >= 1:
            credit[lang] -= 1
            yield text


def _texts(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield the language and each text of every message."""
    for record in read_records(paths):
        for message in record.messages:
            for text in message_texts(message):
                yield record.lang, text

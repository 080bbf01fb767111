"""Text for tokenizer training: languages in proportion to (their size) ** alpha, so that small ones are not starved."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.records import plan_pieces, read_piece
from pipeline.common.errors import UserError


def sample_texts(paths: list[Path], alpha: float, max_characters: int) -> Iterator[str]:
    """The message texts of canonical files, about `max_characters` or as many as there are, streamed.

    Language l gets a share proportional to n_l ** alpha of the characters, n_l being its own number: alpha 1 keeps the
    proportions, 0 makes all languages equal. Texts of a language are taken evenly, or repeated where its share exceeds
    what it has. Raises UserError for unreadable records and for alpha outside 0 .. 1.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha must lie in 0 .. 1, not {alpha}")
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
    for piece in plan_pieces(paths):
        for _, record in read_piece(piece):
            for message in record.messages:
                yield record.lang, message["content"]

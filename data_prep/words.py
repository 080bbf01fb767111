"""Tokenizing word by word with a cache: the tokens of the `tokenizers` library, several times faster on running text.

A fast tokenizer cuts text at added tokens, then into words, and tokenizes every word by itself. Where the rules of that
cut are ones this module knows, a word's tokens can be remembered. `WordEncoder.of` says where.
"""

import json
import re
from collections.abc import Callable
from itertools import chain

from tokenizers import Tokenizer

CACHED_WORDS = 100_000  # of each kind; running text repeats far fewer
CACHED_LENGTH = 40  # characters; longer words, as of scripts without spaces, hardly repeat

Span = tuple[int, int]


def fold(ids: list[int], spans: list[Span]) -> list[int]:
    """Token ids with those within `spans` of tokens as complements: how ids and mask travel as one."""
    tokens = list(ids)
    for start, end in spans:
        tokens[start:end] = [~i for i in ids[start:end]]
    return tokens


class _Cache(dict):
    """Word -> its token ids, computed when first asked for."""

    def __init__(self, tokenize: Callable[[str], list[int]]):
        super().__init__()
        self._tokenize = tokenize

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenize(word)
        if len(word) <= CACHED_LENGTH and len(self) < CACHED_WORDS:
            self[word] = ids
        return ids


class WordEncoder:
    """Tokens of text for tokenizers that cut it into words before spaces (SentencePiece's way, as ours)."""

    def __init__(self, backend: Tokenizer, added: dict[str, int]):
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        model = backend.model

        def ids(word: str) -> list[int]:
            return [token.id for token in model.tokenize(word)]

        def complements(word: str) -> list[int]:
            return [~i for i in ids(word)]

        # First words of a segment, and the others, which have a space before; apart for supervised text.
        self._caches = {
            False: (_Cache(ids), _Cache(lambda word: ids("▁" + word))),
            True: (_Cache(complements), _Cache(lambda word: complements("▁" + word))),
        }

    @classmethod
    def of(cls, backend: Tokenizer) -> "WordEncoder | None":
        """An encoder with the same tokens as `backend`, or None where its rules are not known here."""
        rules = json.loads(backend.to_str())
        cut = rules["pre_tokenizer"] or {}
        added = rules["added_tokens"]
        known = (
            rules["normalizer"] is None
            and cut.get("type") == "Metaspace"
            and (cut["replacement"], cut["prepend_scheme"], cut["split"]) == ("▁", "never", True)
            and rules["model"]["type"] in ("BPE", "Unigram")
            and not rules["model"].get("dropout")
            and added
            and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        )
        return cls(backend, {token["content"]: token["id"] for token in added}) if known else None

    def encode(self, text: str, spans: list[Span]) -> list[int] | None:
        """Token ids, as complements within `spans` of characters; None where a span does not lie between cuts."""
        tokens: list[int] = []
        edges = {edge for span in spans for edge in span}
        coming = iter(spans)
        span = next(coming, None)
        place = 0
        for number, segment in enumerate(self._split(text)):
            edges.discard(place)
            while span is not None and place >= span[1]:
                span = next(coming, None)
            supervised = span is not None and place >= span[0]
            place += len(segment)
            if number % 2:
                token = self._added[segment]
                tokens.append(~token if supervised else token)
            elif segment:
                first, others = self._caches[supervised]
                words = segment.replace("▁", " ").split(" ")
                if words[0]:
                    tokens += first[words[0]]
                tokens.extend(chain.from_iterable(map(others.__getitem__, words[1:])))
        edges.discard(place)
        return None if edges else tokens

"""Tokenizing word by word with a cache: the tokens of the `tokenizers` library, several times faster on running text.

A fast tokenizer cuts text at added tokens, then into words, and tokenizes every word by itself. Where the rules of that
cut are ones this module knows, a word's tokens can be remembered. `WordEncoder.of` says where.
"""

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

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


# The ways to cut text into words under which text falls apart before every space that follows a visible character: no
# alternative of these patterns goes on over such a place, none looks back, and what they look ahead at is white space.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,  # Qwen 2, 2.5, 3
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,  # Llama 3, cl100k
}
_INNER_SPACE = re.compile(r"\s ")
_CUT = re.compile(r"(?<=\S)(?= )")


def _cuts_before_spaces(cut: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer, as tokenizer.json spells it, is one of those known to."""
    if cut is None:
        return False
    if cut["type"] == "Metaspace":
        return (cut["replacement"], cut["prepend_scheme"], cut["split"]) == ("▁", "never", True)
    if cut["type"] == "ByteLevel":
        return cut["use_regex"] and not cut["add_prefix_space"]  # GPT-2's pattern
    if cut["type"] == "Sequence" and [one["type"] for one in cut["pretokenizers"]] == ["Split", "ByteLevel"]:
        split, byte_level = cut["pretokenizers"]
        known = split["pattern"].get("Regex") in _PATTERNS and split["behavior"] == "Isolated" and not split["invert"]
        return known and not byte_level["use_regex"] and not byte_level["add_prefix_space"]
    return False


class WordEncoder:
    """Tokens of text for tokenizers that cut it before spaces: SentencePiece's way as ours, GPT-2, Llama 3, Qwen."""

    def __init__(self, backend: Tokenizer, added: dict[str, int]):
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        normalizer, cut, model = backend.normalizer, backend.pre_tokenizer, backend.model

        def ids(text: str) -> list[int]:
            text = normalizer.normalize_str(text) if normalizer else text
            return [token.id for word, _ in cut.pre_tokenize_str(text) for token in model.tokenize(word)]

        def complements(text: str) -> list[int]:
            return [~i for i in ids(text)]

        # First words of a segment, and the others, which have a space before; apart for supervised text.
        self._caches = {
            False: (_Cache(ids), _Cache(lambda word: ids(" " + word))),
            True: (_Cache(complements), _Cache(lambda word: complements(" " + word))),
        }

    @classmethod
    def of(cls, backend: Tokenizer) -> "WordEncoder | None":
        """An encoder with the same tokens as `backend`, or None where its rules are not known here."""
        rules = json.loads(backend.to_str())
        normalizer, added = rules["normalizer"], rules["added_tokens"]
        known = (
            (normalizer is None or normalizer == {"type": "NFC"})  # composes nothing over a space
            and _cuts_before_spaces(rules["pre_tokenizer"])
            and rules["model"]["type"] in ("BPE", "Unigram")
            and not rules["model"].get("dropout")
            and added
            and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
            and not any(token["normalized"] and normalizer for token in added)
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
                if _INNER_SPACE.search(segment):  # longer runs of white space stay with the word behind them
                    tokens.extend(chain.from_iterable(map(first.__getitem__, _CUT.split(segment))))
                    continue
                start, *words = segment.split(" ")
                if start:
                    tokens += first[start]
                tokens.extend(chain.from_iterable(map(others.__getitem__, words)))
        edges.discard(place)
        return None if edges else tokens

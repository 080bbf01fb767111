"""Word-by-word tokenization with a cache. Several times faster than the `tokenizers` library, with identical tokens.

A fast tokenizer splits text at added tokens and then into words, and tokenizes every word independently. The tokens of
a word can therefore be cached if the tokenizer splits text before spaces, which `WordEncoder.for_backend` checks.
"""

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace, PreTokenizer

CACHED_WORDS = 100_000  # entries of one cache; ordinary text repeats far fewer words
CACHED_LENGTH = 40  # characters; longer words, such as those of scripts without spaces, are rarely repeated

Span = tuple[int, int]


def complement_spans(ids: list[int], spans: list[Span]) -> list[int]:
    """Replace the token ids within `spans` by their complements, which encodes ids and target mask in one list."""
    tokens = list(ids)
    for start, end in spans:
        tokens[start:end] = [~i for i in ids[start:end]]
    return tokens


class _Cache(dict):
    """Token ids by word, computed on first access."""

    def __init__(self, tokenize: Callable[[str], list[int]]):
        super().__init__()
        self._tokenize = tokenize

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenize(word)
        if len(word) <= CACHED_LENGTH and len(self) < CACHED_WORDS:
            self[word] = ids
        return ids


# Pre-tokenizer patterns that split text before every space that follows a visible character: no alternative matches
# across such a position or looks behind, and the only lookahead is at white space.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,  # Qwen 2, 2.5, 3
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,  # Llama 3, cl100k
}
_INNER_SPACE = re.compile(r"\s ")
_WORD_START = re.compile(r"(?<=\S)(?= )")
_METASPACE = "▁"  # stands for a space in SentencePiece
_BEFORE_METASPACE = re.compile(f"(?<!^)(?={_METASPACE})")


def _splits_before_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Return whether a pre-tokenizer (its entry in tokenizer.json) is known to split before spaces."""
    if pre_tokenizer is None:
        return False
    kind = pre_tokenizer["type"]
    if kind == "Metaspace":
        settings = (pre_tokenizer["replacement"], pre_tokenizer["prepend_scheme"], pre_tokenizer["split"])
        return settings == (_METASPACE, "never", True)
    if kind == "ByteLevel":
        return pre_tokenizer["use_regex"] and not pre_tokenizer["add_prefix_space"]  # GPT-2's pattern
    if kind == "Sequence" and [step["type"] for step in pre_tokenizer["pretokenizers"]] == ["Split", "ByteLevel"]:
        split, byte_level = pre_tokenizer["pretokenizers"]
        known_pattern = split["pattern"].get("Regex") in SPLIT_PATTERNS
        isolates_matches = split["behavior"] == "Isolated" and not split["invert"]
        maps_bytes_only = not byte_level["use_regex"] and not byte_level["add_prefix_space"]
        return known_pattern and isolates_matches and maps_bytes_only
    return False


def _words(pre_tokenizer: PreTokenizer) -> Callable[[str], list[str]]:
    """Return a function that divides a text as a pre-tokenizer does that splits before spaces."""
    if isinstance(pre_tokenizer, Metaspace):  # calling it would take longer than tokenizing the word
        return lambda text: _BEFORE_METASPACE.split(text.replace(" ", _METASPACE)) if text else []
    return lambda text: [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def _can_hide(first: str, second: str) -> bool:
    """Return whether an occurrence of `first` can contain one of `second`, or its start."""
    return second in first or any(first.endswith(second[:length]) for length in range(1, len(second)))


class WordEncoder:
    """Encoder for tokenizers that split before spaces: GPT-2, Llama 3, Qwen, SentencePiece without dummy prefix.

    Args:
        backend: Tokenizer to reproduce.
        added: Ids of its added tokens, including special tokens.
    """

    def __init__(self, backend: Tokenizer, added: dict[str, int]):
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        normalizer, words, model = backend.normalizer, _words(backend.pre_tokenizer), backend.model

        def ids(text: str) -> list[int]:
            text = normalizer.normalize_str(text) if normalizer else text
            return [token.id for word in words(text) for token in model.tokenize(word)]

        def complements(cache: _Cache) -> _Cache:
            return _Cache(lambda word: [~i for i in cache[word]])

        # The ids of target text are complemented (~id), so that one list holds both the ids and which of them are
        # targets. Both target text (True) and other text (False) have a cache for the first word of a segment, which is
        # the text between two added tokens, and one for words after a space.
        first, others = _Cache(ids), _Cache(lambda word: ids(" " + word))
        self._caches = {False: (first, others), True: (complements(first), complements(others))}

    @classmethod
    def for_backend(cls, backend: Tokenizer) -> "WordEncoder | None":
        """Return an encoder that gives the same tokens as `backend`, or None if its rules are not supported."""
        rules = json.loads(backend.to_str())
        normalizer, added = rules["normalizer"], rules["added_tokens"]
        # The library looks for the normalized added tokens last, in the text between the others.
        last = [token["content"] for token in added if token["normalized"]]
        others = [token["content"] for token in added if not token["normalized"]]
        known = (
            (normalizer is None or normalizer == {"type": "NFC"})  # does not compose characters across a space
            and _splits_before_spaces(rules["pre_tokenizer"])
            and rules["model"]["type"] in ("BPE", "Unigram")
            and not rules["model"].get("dropout")
            and added
            and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
            and not (last and normalizer)
            and not any(_can_hide(token, other) for token in last for other in others)
        )
        return cls(backend, {token["content"]: token["id"] for token in added}) if known else None

    def encode(self, text: str, spans: list[Span]) -> list[int] | None:
        """Return the token ids of a text. Within `spans`, each id is replaced by its complement ~id.

        Returns None unless all spans start and end at a boundary of the text or of an added token.
        """
        tokens: list[int] = []
        boundaries = {boundary for span in spans for boundary in span}
        remaining = iter(spans)
        span = next(remaining, None)
        position = 0
        for number, segment in enumerate(self._split(text)):
            boundaries.discard(position)
            while span is not None and position >= span[1]:
                span = next(remaining, None)
            supervised = span is not None and position >= span[0]
            position += len(segment)
            if number % 2:  # re.split puts the added tokens at the odd indices
                token = self._added[segment]
                tokens.append(~token if supervised else token)
            elif segment:
                first, others = self._caches[supervised]
                if _INNER_SPACE.search(segment):  # a run of white space belongs to the word after it
                    tokens.extend(chain.from_iterable(map(first.__getitem__, _WORD_START.split(segment))))
                    continue
                start, *words = segment.split(" ")
                if start:
                    tokens += first[start]
                tokens.extend(chain.from_iterable(map(others.__getitem__, words)))
        boundaries.discard(position)
        return None if boundaries else tokens

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.demo.languages import LANGUAGES
from data_prep.demo.problems import draw_problems, tell
from data_prep.tokenization.tokenizer import load_tokenizer
from data_prep.tokenization.word_encoder import _PATTERNS, WordEncoder, fold

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
PARTS = [
    *SPECIAL,
    "<|us",
    " ",
    "  ",
    "\n",
    " \n",
    "\t ",
    "\u00a0",
    "\u3000",
    "\x1c",
    "\u2028",
    "▁",
    "'s",
    " 'LL",
    "!",
    ")\n",
]
PARTS += ["apples", "12", "3456", "Anne ", "é", "e\u0301", " \u0301", "你好", "🦒", "ſ", "K", "ᄀ", "ᅡ"]
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=5)), max_size=20).map("".join)


def byte_level(cut: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    told = [
        text for problem in draw_problems(40, 0) for language in LANGUAGES.values() for text in tell(problem, language)
    ]
    tokenizer.train_from_iterator(told, trainer)
    return tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


@pytest.fixture(scope="module")
def backends(tokenizer_dir) -> list[Tokenizer]:
    """Ours, GPT-2's, Llama 3's and Qwen's rules."""
    found = [load_tokenizer(tokenizer_dir).backend_tokenizer]
    found.append(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), None))
    return found + [byte_level(split(pattern), normalizers.NFC()) for pattern in sorted(_PATTERNS)]


@given(TEXTS)
@settings(max_examples=400, deadline=None)
def test_same_tokens_as_the_library(backends, text):
    for backend in backends:
        encoder = WordEncoder.of(backend)
        for _ in range(2):  # computed, then remembered
            assert encoder.encode(text, []) == backend.encode(text, add_special_tokens=False).ids


def test_spans_between_cuts_become_complements_and_others_are_declined(backends):
    backend = backends[0]
    encoder = WordEncoder.of(backend)
    text = "<s>one two<|assistant|>three</s>four"
    ids = backend.encode(text, add_special_tokens=False).ids
    start, end = text.index("three"), text.index("four")
    first = ids.index(backend.token_to_id("<|assistant|>")) + 1
    assert encoder.encode(text, [(start, end)]) == fold(ids, [(first, ids.index(2) + 1)])
    assert encoder.encode(text, [(start, len(text))]) == fold(ids, [(first, len(ids))])
    assert encoder.encode(text, [(start + 1, end)]) is None


def test_tokenizers_with_other_rules_are_left_to_the_library(backends):
    plain = Tokenizer(models.BPE({"a": 0, "<s>": 1}, []))
    plain.add_special_tokens(["<s>"])
    assert WordEncoder.of(plain) is None
    others = [
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Whitespace(),
        split(r"\w+ \w+|."),
    ]
    for cut in others:
        plain.pre_tokenizer = cut
        assert WordEncoder.of(plain) is None
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    assert WordEncoder.of(plain) is not None
    plain.normalizer = normalizers.Lowercase()
    assert WordEncoder.of(plain) is None

"""The word encoder gives the tokens of the `tokenizers` library or is not used."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.demo.languages import DEMO_LANGUAGES
from data_prep.demo.problems import draw_problems, format_problem
from data_prep.tokenization.tokenizer import load_tokenizer
from data_prep.tokenization.word_encoder import SPLIT_PATTERNS, WordEncoder, _words, complement_spans

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


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    problems = draw_problems(40, 0)
    pairs = [format_problem(problem, language) for problem in problems for language in DEMO_LANGUAGES.values()]
    tokenizer.train_from_iterator([text for pair in pairs for text in pair], trainer)
    return tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


@pytest.fixture(scope="module")
def backends(tokenizer_dir) -> list[Tokenizer]:
    """Tokenizers with the rules of `tokenizer.train`, GPT-2, Llama 3 and Qwen."""
    result = [load_tokenizer(tokenizer_dir).backend_tokenizer]
    result.append(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), None))
    return result + [byte_level(split(pattern), normalizers.NFC()) for pattern in sorted(SPLIT_PATTERNS)]


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_word_encoder_matches_tokenizers_library(backends, text):
    for backend in backends:
        encoder = WordEncoder.for_backend(backend)
        for _ in range(2):  # first computed, then cached
            assert encoder.encode(text, []) == backend.encode(text, add_special_tokens=False).ids


@given(st.text(alphabet=" ▁a\n\t\u00a0", max_size=12))
def test_words_of_sentencepiece_match_tokenizers_library(text):
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="never")
    assert _words(metaspace)(text) == [word for word, _ in metaspace.pre_tokenize_str(text)]


def test_word_encoder_complements_spans_between_added_tokens(backends):
    backend = backends[0]
    encoder = WordEncoder.for_backend(backend)
    text = "<s>one two<|assistant|>three</s>four"
    ids = backend.encode(text, add_special_tokens=False).ids
    start, end = text.index("three"), text.index("four")
    first = ids.index(backend.token_to_id("<|assistant|>")) + 1
    assert encoder.encode(text, [(start, end)]) == complement_spans(ids, [(first, ids.index(2) + 1)])
    assert encoder.encode(text, [(start, len(text))]) == complement_spans(ids, [(first, len(ids))])
    assert encoder.encode(text, [(start + 1, end)]) is None


def test_word_encoder_rejects_unsupported_rules(backends):
    plain = Tokenizer(models.BPE({"a": 0, "<s>": 1}, []))
    plain.add_special_tokens(["<s>"])
    assert WordEncoder.for_backend(plain) is None
    others = [
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Whitespace(),
        split(r"\w+ \w+|."),
    ]
    for pre_tokenizer in others:
        plain.pre_tokenizer = pre_tokenizer
        assert WordEncoder.for_backend(plain) is None
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    assert WordEncoder.for_backend(plain) is not None
    plain.normalizer = normalizers.Lowercase()
    assert WordEncoder.for_backend(plain) is None


@pytest.mark.parametrize(
    ("normalized", "other", "supported"),
    [
        ("<a|b>", "<a", False),  # the same start
        ("<a|b>", "|b", False),
        ("<a", "a>", False),  # the end of one is the start of the other
        ("a>", "<a", True),
        ("<b>", "<a>", True),
    ],
)
def test_word_encoder_of_normalized_added_tokens(normalized, other, supported):
    """The library looks for them last, so that another added token within one of them is found first."""
    backend = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), None)
    backend.add_tokens([AddedToken(normalized, normalized=True), AddedToken(other, normalized=False)])
    encoder = WordEncoder.for_backend(backend)
    assert (encoder is not None) == supported
    for text in (normalized, f"{normalized}{other}", "x <a|b> y<a> z<b>"):
        assert encoder is None or encoder.encode(text, []) == backend.encode(text, add_special_tokens=False).ids

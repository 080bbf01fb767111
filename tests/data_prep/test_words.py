import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.tokenizer import load_tokenizer
from data_prep.words import WordEncoder, fold

PARTS = st.sampled_from(
    ["<s>", "</s>", "<|user|>", "<|us", " ", "  ", "\n", "▁", "apples", "12", "Anne ", "é", "你好", "🦒"]
)


@given(st.lists(st.one_of(PARTS, st.text(max_size=5)), max_size=20).map("".join))
@settings(max_examples=300)
def test_same_tokens_as_the_library(text):
    backend = BACKEND[0]
    expected = backend.encode(text, add_special_tokens=False).ids
    encoder = WordEncoder.of(backend)
    for _ in range(2):  # computed, then remembered
        assert encoder.encode(text, []) == expected


@pytest.fixture(scope="module", autouse=True)
def backend(tokenizer_dir):
    BACKEND[:] = [load_tokenizer(tokenizer_dir).backend_tokenizer]


BACKEND: list[Tokenizer] = []


def test_spans_between_cuts_become_complements_and_others_are_declined():
    encoder = WordEncoder.of(BACKEND[0])
    text = "<s>one two<|assistant|>three</s>four"
    ids = BACKEND[0].encode(text, add_special_tokens=False).ids
    start, end = text.index("three"), text.index("four")
    first = ids.index(BACKEND[0].token_to_id("<|assistant|>")) + 1
    assert encoder.encode(text, [(start, end)]) == fold(ids, [(first, ids.index(2) + 1)])
    assert encoder.encode(text, [(start, len(text))]) == fold(ids, [(first, len(ids))])
    assert encoder.encode(text, [(start + 1, end)]) is None


def test_tokenizers_with_other_rules_are_left_to_the_library():
    plain = Tokenizer(models.BPE({"a": 0, "<s>": 1}, []))
    plain.add_special_tokens(["<s>"])
    assert WordEncoder.of(plain) is None
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    assert WordEncoder.of(plain) is None
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    assert WordEncoder.of(plain) is not None

"""Tokens and masks of conversations."""

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from data_prep.tokenization.chat_template import ChatEncoder
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import UserError

CHATS = [
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}],
    [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "答案是4。"},
    ],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " leading\nand more "},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "last 🦒"},
    ],
]
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


def encode(tokenizer, chat) -> np.ndarray:
    (tokens,) = ChatEncoder(tokenizer).encode([chat])
    return np.array(tokens)


@pytest.mark.parametrize("chat", CHATS)
def test_encode_matches_transformers_tokens_and_mask(chat, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokens = encode(tokenizer, chat)
    expected = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert np.where(tokens < 0, ~tokens, tokens).tolist() == expected["input_ids"]
    assert (tokens < 0).astype(int).tolist() == expected["assistant_masks"]


def test_encode_ignores_saved_truncation_and_padding(tokenizer_dir, tmp_path):
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = encode(tokenizer, CHATS[2])
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")  # its settings are saved with the tokenizer
    tokenizer.save_pretrained(tmp_path)
    assert encode(load_tokenizer(tmp_path), CHATS[2]).tolist() == expected.tolist()


def test_encode_supervises_responses_and_stop_tokens(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokens = encode(tokenizer, CHATS[2])
    assert tokenizer.decode((~tokens[tokens < 0]).tolist()) == " leading\nand more </s>last 🦒</s>"


def test_encode_supervises_all_tokens_of_last_character(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|assistant|>' }}"
        "{% else %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokens = encode(tokenizer, [*CHATS[0][:1], {"role": "assistant", "content": "a 🦒"}])
    assert tokenizer.decode((~tokens[tokens < 0]).tolist()) == "a 🦒"
    assert tokens[-1] == tokenizer.eos_token_id


def test_encode_without_markers_supervises_after_generation_prompts(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = CHATML
    encoded = [encode(tokenizer, chat) for chat in CHATS]
    texts = [tokenizer.decode((~tokens[tokens < 0]).tolist()) for tokens in encoded]
    assert texts == ["4.</s>", "答案是4。</s>", " leading\nand more </s>last 🦒</s>"]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("template", [None, CHATML])
def test_encode_supervises_spaces_that_the_post_processor_trims(template, sequence, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = template or tokenizer.chat_template
    chat = [CHATS[0][0], {"role": "assistant", "content": "\n 4. "}]
    expected = encode(tokenizer, chat).tolist()
    trimming = processors.ByteLevel(trim_offsets=True)
    post_processor = processors.Sequence([trimming]) if sequence else trimming
    tokenizer.backend_tokenizer.post_processor = post_processor
    assert encode(tokenizer, chat).tolist() == expected
    assert repr(tokenizer.backend_tokenizer.post_processor) == repr(post_processor)  # not changed for others


def test_encode_rejects_prompt_merged_with_response(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}{{ '\nAnswer: H' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ow many"}]
    (error,) = ChatEncoder(tokenizer).encode([chat])
    assert isinstance(error, UserError) and "prefix" in str(error)


def test_encode_returns_errors_for_bad_conversations_only(tokenizer_dir):
    encoder = ChatEncoder(load_tokenizer(tokenizer_dir))
    surrogate = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]
    tool = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]
    question = [{"role": "user", "content": "only asks"}]
    results = encoder.encode([CHATS[0], surrogate, tool, question, CHATS[1]])
    assert [isinstance(result, UserError) for result in results] == [False, True, True, True, False]
    assert (
        "Unicode" in str(results[1])
        and "unknown role tool" in str(results[2])
        and "no supervised token" in str(results[3])
    )

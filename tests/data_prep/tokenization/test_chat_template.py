import numpy as np
import pytest
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
def test_equals_transformers_own_tokens_and_mask(chat, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokens = encode(tokenizer, chat)
    own = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert np.where(tokens < 0, ~tokens, tokens).tolist() == own["input_ids"]
    assert (tokens < 0).astype(int).tolist() == own["assistant_masks"]


def test_supervised_text_is_the_responses_with_their_ends(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokens = encode(tokenizer, CHATS[2])
    assert tokenizer.decode((~tokens[tokens < 0]).tolist()) == " leading\nand more </s>last 🦒</s>"


def test_a_span_ending_in_a_character_of_several_tokens_is_supervised_whole(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|assistant|>' }}"
        "{% else %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokens = encode(tokenizer, [*CHATS[0][:1], {"role": "assistant", "content": "a 🦒"}])
    assert tokenizer.decode((~tokens[tokens < 0]).tolist()) == "a 🦒"
    assert tokens[-1] == tokenizer.eos_token_id


def test_template_without_markers_supervises_what_follows_each_generation_prompt(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = CHATML
    found = [encode(tokenizer, chat) for chat in CHATS]
    texts = [tokenizer.decode((~tokens[tokens < 0]).tolist()) for tokens in found]
    assert texts == ["4.</s>", "答案是4。</s>", " leading\nand more </s>last 🦒</s>"]


def test_a_prompt_that_melts_into_the_response_is_refused(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}{{ '\nAnswer: H' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ow many"}]
    (found,) = ChatEncoder(tokenizer).encode([chat])
    assert isinstance(found, UserError) and "prefix" in str(found)


def test_what_cannot_be_encoded_is_an_error_in_its_place_and_spares_the_others(tokenizer_dir):
    encoder = ChatEncoder(load_tokenizer(tokenizer_dir))
    surrogate = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]
    tool = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]
    question = [{"role": "user", "content": "only asks"}]
    found = encoder.encode([CHATS[0], surrogate, tool, question, CHATS[1]])
    assert [isinstance(one, UserError) for one in found] == [False, True, True, True, False]
    assert (
        "Unicode" in str(found[1]) and "unknown role tool" in str(found[2]) and "no supervised token" in str(found[3])
    )

"""Stop tokens found from chat templates of the families in use, and kept from a model's generation config."""

import pytest
from tokenizers import AddedToken
from transformers import AutoConfig, GenerationConfig

from pipeline.common.errors import UserError
from pipeline.config.settings import ModelSettings
from pipeline.models.loading import load_model_config
from pipeline.models.stop_tokens import end_of_turn_id, stop_strings, stop_token_ids
from tests.pipeline.evaluation.tiny_model import make_tokenizer
from tests.runs import TINY

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {  # template: the token that ends its assistant turns
    CHATML: "<|im_end|>",
    # Qwen3 writes an empty think block before the last response.
    CHATML.replace("{{ m.content }}", "<think>\n\n</think>\n\n{{ m.content }}"): "<|im_end|>",
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}": "<|end|>",  # Phi-3
    "{% for m in messages %}<|user|>{{ m.content | trim }}\n\n<|end|>\n{% endfor %}": "<|end|>",  # whitespace first
    "{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}": "</s>",  # Mistral
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}": None,  # no token ends a turn
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer(["question response assistant user"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<|end|>", special=False), AddedToken("\n\n", special=False)])
    return tokenizer


@pytest.mark.parametrize(("template", "token"), TEMPLATES.items())
def test_end_of_turn_id_is_first_added_token_after_response(tokenizer, template, token):
    tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer) or 0) == (token or "<pad>")
    expected = {tokenizer.eos_token_id, 7, 9} | ({tokenizer.convert_tokens_to_ids(token)} if token else set())
    assert stop_token_ids([9, 7], tokenizer) == sorted(expected)


def test_stop_strings_only_without_end_of_turn_token(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### End\n{% endfor %}"
    assert stop_strings(tokenizer) == ["### End"] and end_of_turn_id(tokenizer) is None
    for template in TEMPLATES:
        tokenizer.chat_template = template
        assert stop_strings(tokenizer) is None
    tokenizer.chat_template = None
    assert stop_strings(tokenizer) is None


def test_stop_token_ids_of_template_that_cannot_be_rendered(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"the chat template rejects a question with its answer \(no\)"):
        stop_token_ids(1, tokenizer)
    tokenizer.chat_template = None
    assert stop_token_ids(None, tokenizer) == [tokenizer.eos_token_id]


def test_load_model_config_keeps_stop_tokens_of_generation_config(tmp_path):
    AutoConfig.for_model(**TINY, vocab_size=600, eos_token_id=201).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path))
    assert load_model_config(settings, 600).eos_token_id == 201
    GenerationConfig(eos_token_id=[201, 204]).save_pretrained(tmp_path)
    assert load_model_config(settings, 600).eos_token_id == [201, 204]

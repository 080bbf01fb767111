"""Tokenizer of the synthetic benchmark, whose tokens are words or parts of them."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.tokenization.sentencepiece_models import CHAT_TEMPLATE, ROLES

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", *ROLES)
WORD_START = "▁"  # begins the first token of a word


def build_tokenizer(pieces: Iterable[str], first_syllables: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the chat template of `python -m data_prep tokenizer`.

    Args:
        pieces: the vocabulary, without special tokens.
        first_syllables: number of syllables (a consonant and a vowel) of a word's first token, which begins with
            `WORD_START`. Each further syllable is a token. 0: each word is a token.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # type: ignore[call-arg]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[call-arg]
    if first_syllables:
        first = f"{WORD_START}([a-z][aeiou]){{{first_syllables}}}"
        split = pre_tokenizers.Split(Regex(f"{first}|[a-z][aeiou]"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), split])  # type: ignore[call-arg]
        backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

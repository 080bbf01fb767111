"""Tokenizer of the synthetic benchmark, whose tokens are words or syllables."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.tokenization.sentencepiece_models import CHAT_TEMPLATE, ROLES

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", *ROLES)
WORD_START = "▁"  # begins the first syllable of a word


def build_tokenizer(pieces: Iterable[str], syllables: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the chat template of `python -m data_prep tokenizer`.

    Args:
        pieces: the vocabulary, without special tokens.
        syllables: whether words consist of syllables (a consonant and a vowel), with `WORD_START` before the first one.
            Otherwise each word is a token.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # type: ignore[call-arg]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[call-arg]
    if syllables:
        split = pre_tokenizers.Split(Regex(f"{WORD_START}?[a-z][aeiou]"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), split])  # type: ignore[call-arg]
        backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

"""Train SentencePiece models, and convert them to transformers tokenizers with this project's chat template."""

import io
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from pipeline.common.errors import UserError, first_line

MAX_TEXT_BYTES = 1 << 16  # SentencePiece skips longer texts without an error
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# The stop token after an assistant message is a target, so that the model learns to stop.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ '<|system|>' + message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a SentencePiece BPE model and return it as a transformers tokenizer with `CHAT_TEMPLATE`.

    It uses byte fallback, so that no text is unknown, and splits numbers into digits. It does not normalize, so that
    decoding restores the text. Unigram models are not used because they take their vocabulary from distinct words, and
    text generated from templates has few of them.

    Args:
        texts: Training text.
        vocab_size: Number of tokens, special tokens included.

    Raises:
        UserError: there is no text, or `vocab_size` is too small for the number of distinct characters or too large for
            the number of possible merges.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short_texts(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            control_symbols=list(ROLES),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=MAX_TEXT_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"SentencePiece cannot train a vocabulary of {vocab_size} on this data ({reason})") from None
    return from_sentencepiece(model.getvalue())


def _short_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, and those that could be too long for SentencePiece in parts."""
    size = MAX_TEXT_BYTES // 4  # characters; UTF-8 has at most four bytes for each
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start : start + size]


def from_sentencepiece(model: bytes, name: str = "the SentencePiece model") -> PreTrainedTokenizerFast:
    """Convert a SentencePiece model to a transformers tokenizer with the special tokens and template of this module.

    Special tokens that are missing from the model are appended to its vocabulary.

    Args:
        model: Content of a BPE or unigram model file.
        name: Name of the model in error messages.

    Raises:
        UserError: `model` is not a BPE or unigram model, or the result would tokenize differently from SentencePiece.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError):
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"{name}: not a SentencePiece model")
    backend = _backend(proto, name)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    special_ids = (processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id())
    for position, token_id in enumerate(special_ids):
        if token_id >= 0:  # SentencePiece returns -1 for a token that the model lacks
            special[position] = processor.id_to_piece(token_id)
    symbols = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*special, *ROLES)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in symbols])
    for text in _sample(proto, symbols):
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(
                f"{name}: cannot be converted exactly ({text!a} is tokenized differently); "
                "pass a tokenizer directory instead"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True)),
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _sample(proto: ModelProto, symbols: list[str]) -> Iterator[str]:
    """Yield texts that both tokenizers must encode alike."""
    for first, second in pairwise(proto.pieces):
        if first.type == second.type == first.NORMAL:
            # Two pieces may be marks of different scripts in an order that no text has.
            yield unicodedata.normalize("NFC", f"{first.piece}{second.piece}".replace("▁", " "))
    yield from (" two  spaces ", "12 345,60", "ｆｕｌｌ ｗｉｄｔｈ", "é ﬁ", "🦒 unseen ྿")
    yield from (unicodedata.normalize("NFD", text) for text in ("é", "tiếng Việt", "क़लम", "한국어 값", "がぎ"))
    for symbol in (symbol.replace("▁", " ") for symbol in symbols):
        yield from (f"{symbol}a", f"a{symbol}b", f"a {symbol} b")


def _backend(proto: ModelProto, name: str) -> Tokenizer:
    """Build a fast tokenizer (model, normalizer, pre-tokenizer, decoder) from a SentencePiece model."""
    scores = {piece.piece: piece.score for piece in proto.pieces}
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type == spec.BPE:
        vocabulary = {piece: i for i, piece in enumerate(scores)}
        merges = generate_merges(vocabulary, scores)
        fallback = {"unk_token": spec.unk_piece, "byte_fallback": spec.byte_fallback, "fuse_unk": True}
        backend = Tokenizer(models.BPE(vocabulary, merges, **fallback))
    elif spec.model_type == spec.UNIGRAM:
        backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=spec.unk_id, byte_fallback=spec.byte_fallback))
    else:
        raise UserError(f"{name}: neither a BPE nor a unigram model")
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        if "nfkc" in rules.name:
            steps.append(normalizers.NFC())  # Precompiled does not compose characters of three bytes, such as jamo
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # Strip would also remove line ends, which models without normalization keep.
        steps += [normalizers.Replace(Regex(pattern), by) for pattern, by in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))  # Metaspace would not prepend to text that begins with a space
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    # If no token contains a space after its start, splitting at spaces changes no token and allows caching words.
    split = not any("▁" in piece[1:] for piece in scores)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=split)
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    return backend

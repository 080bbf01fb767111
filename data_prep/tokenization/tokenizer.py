"""Load tokenizers, hash their content, and train them with SentencePiece."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.chat_template_utils import _compile_jinja_template

from data_prep.readers import first_line
from pipeline.common.errors import UserError

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


def load_tokenizer(name: str | Path, *, for_training: bool = True) -> PreTrainedTokenizerBase:
    """Load a tokenizer with the class that its own files declare.

    Args:
        name: directory, Hub model ID, or SentencePiece model file (`.model`), which gets this project's chat template.
        for_training: also require a fast tokenizer, a usable chat template, and a pad token that differs from the eos
            token, as packing and training need them.

    Raises:
        UserError: it cannot be loaded, or it lacks something that training needs.
    """
    if str(name).endswith(".model") and not Path(name).is_dir():
        try:
            return from_sentencepiece(Path(name).read_bytes(), str(name))
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if not Path(name).is_dir() and _is_path(str(name)):
        raise UserError(f"{name}: no such tokenizer directory; train one with: python -m data_prep tokenizer")
    try:
        tokenizer = _tokenizer_class(name).from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # a damaged file or an unreachable Hub can raise almost any exception
        raise UserError(f"{name}: cannot be loaded as a tokenizer ({first_line(error)})") from None
    if for_training:
        _check_for_training(name, tokenizer)
    return tokenizer


def _tokenizer_class(name: str | Path) -> Any:
    """Return the class that loads a tokenizer.

    If config.json names qwen2 (or one of some other families), AutoTokenizer uses that family's class even if the
    tokenizer declares a generic one. The family's own pre-tokenizer then replaces the one in tokenizer.json, and a
    tokenizer trained by data_prep would split text differently.
    """
    declared = get_tokenizer_config(name).get("tokenizer_class")
    return PreTrainedTokenizerFast if declared in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


def _check_for_training(name: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a tokenizer lacks something that packing and training need."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name}: not a fast tokenizer (no tokenizer.json can be made of it)")
    if not tokenizer.chat_template:
        raise UserError(f"{name}: the tokenizer has no chat template; add chat_template.jinja to it")
    try:
        _compile_jinja_template(tokenizer.get_chat_template())
    except Exception as error:  # jinja2's errors, or several templates of which none is the default
        raise UserError(f"{name}: the chat template cannot be used ({first_line(error)})") from None
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"{name}: the tokenizer lacks a pad or an eos token; set both in tokenizer_config.json")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{name}: the pad token is the eos token; give the tokenizer a pad token of its own")


def _is_path(name: str) -> bool:
    """Return whether a name that is no directory is a path rather than a Hub model ID (NAME or ORGANIZATION/NAME)."""
    return name.startswith((".", os.sep)) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hex SHA-256 of the chat template."""
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hex SHA-256 of everything that determines a conversation's tokens.

    This is the vocabulary, the tokenization rules, the special tokens and the chat template. It does not depend on the
    machine, the path of the tokenizer, or the padding and truncation of earlier calls.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["padding"] = content["truncation"] = None
    content["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content["chat_template"] = tokenizer.get_chat_template()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
            sentence_iterator=iter(texts),
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
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"SentencePiece cannot train a vocabulary of {vocab_size} on this data ({reason})") from None
    return from_sentencepiece(model.getvalue())


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
    symbols = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and len(p.piece) > 1]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*special, *ROLES)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in symbols])
    sample = [
        f"{a.piece}{b.piece}".replace("▁", " ") for a, b in pairwise(proto.pieces) if a.type == b.type == a.NORMAL
    ]
    sample += [" two  spaces ", "12 345,60", "ｆｕｌｌ ｗｉｄｔｈ", "é e\u0301 ﬁ", "🦒 unseen ྿"]
    for text in sample:
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
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
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


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a tokenizer directory atomically. Raises UserError if `output` is not empty or cannot be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already exists; remove it or give another --output")
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None

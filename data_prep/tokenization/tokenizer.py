"""Load tokenizers in the same way for every stage, compare them, and save them."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template
from transformers.utils.hub import cached_file

from data_prep.tokenization.sentencepiece_models import from_sentencepiece
from data_prep.tokenization.template_rendering import CLOCK, fix_clock, reads_clock, set_variables
from pipeline.common.errors import UserError, first_line

# Fields of tokenizer_config.json that this project adds.
PACKED_FINGERPRINT = "packed_fingerprint"  # fingerprint of the tokenizer that packed the data of this model
TEMPLATE_DATE = "chat_template_date"  # the date that replaces the template's clock


def load_tokenizer(
    name: str | Path,
    *,
    for_training: bool = True,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with the rules in its own tokenizer.json, in the same way for every stage.

    A tokenizer without pad token gets its eos token as pad token. Padding is neither a target nor attended to, so any
    id serves. If the chat template reads the clock, it gets the date `template_rendering.CLOCK` instead.

    Args:
        name: Directory, Hub model ID, or SentencePiece model file (`.model`), which gets this project's chat template.
        for_training: Also require a fast tokenizer, a usable chat template, and an eos token, which packing and
            training need.
        chat_template: Jinja template to use instead of the tokenizer's own.
        chat_template_kwargs: Default values of the template's variables; see `template_rendering.set_variables`.

    Raises:
        UserError: It cannot be loaded, it lacks something that training needs, or it belongs to a trained model and
            differs from the tokenizer that packed the training data.
    """
    if str(name).endswith(".model") and not Path(name).is_dir():
        try:
            tokenizer: PreTrainedTokenizerBase = from_sentencepiece(Path(name).read_bytes(), str(name))
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    elif not Path(name).is_dir() and is_path(str(name)):
        advice = "give that of a model or tokenizer, or train one with: python -m data_prep tokenizer"
        raise UserError(f"{name}: no such tokenizer directory; {advice}")
    else:
        try:
            tokenizer = _tokenizer_class(name).from_pretrained(str(name), trust_remote_code=False)
        except Exception as error:  # a damaged file or an unreachable Hub can raise almost any exception
            raise UserError(f"{name}: cannot be loaded as a tokenizer ({first_line(error)})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    try:
        _set_template(tokenizer, tokenizer.chat_template, {})
        _check_unchanged(tokenizer)
        _set_template(tokenizer, chat_template or tokenizer.chat_template, chat_template_kwargs or {})
        if for_training:
            _check_for_training(tokenizer)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return tokenizer


def load_packed_tokenizer(name: str | Path, shards: Path, manifest: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a shard directory, with the chat template and variables that the manifest records.

    The fingerprint is saved with the tokenizer, so that `load_tokenizer` can check the tokenizer of a trained model.

    Args:
        name: Directory or Hub model ID of the tokenizer.
        shards: The shard directory, for error messages.
        manifest: Its manifest.

    Raises:
        UserError: A different tokenizer or chat template packed the shards.
    """
    template, variables = manifest.get("chat_template"), manifest.get("chat_template_kwargs")
    tokenizer = load_tokenizer(name, chat_template=template, chat_template_kwargs=variables)
    if part := part_that_differs(tokenizer, manifest):
        if TEMPLATE_DATE in tokenizer.init_kwargs and manifest.get(TEMPLATE_DATE) is None:
            raise UserError(
                f"{shards}: packed by an earlier version, in which the chat template of {name} wrote the date of that "
                "packing (strftime_now); pack again, this version writes a fixed date"
            )
        raise UserError(
            f"{shards}: packed with a {part} that differs from that of {name}; pack again, or give the original one"
        )
    tokenizer.init_kwargs[PACKED_FINGERPRINT] = manifest["tokenizer"]["fingerprint"]
    return tokenizer


def part_that_differs(tokenizer: PreTrainedTokenizerBase, manifest: Mapping[str, Any]) -> str | None:
    """Return "tokenizer" or "chat template" if it differs from the one that packed shards, or None if both are equal.

    Args:
        tokenizer: A tokenizer with its chat template and variables.
        manifest: The manifest of the shards, which may be of an earlier version.
    """
    if has_fingerprint(tokenizer, manifest["tokenizer"]["fingerprint"]):
        return None
    same_template = chat_template_hash(tokenizer) == manifest.get("chat_template_sha256")
    return "tokenizer" if same_template else "chat template"


def _tokenizer_class(name: str | Path) -> Any:
    """Return the class that loads a tokenizer.

    AutoTokenizer may choose the class of the model's family, which replaces the pre-tokenizer in tokenizer.json by the
    family's own. A tokenizer trained by data_prep would then split text differently. The generic class uses the file's
    rules as they are. AutoTokenizer is left for tokenizers without that file, which it converts.
    """
    try:
        file = cached_file(str(name), "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither in the cache nor on the Hub
        file = None
    return PreTrainedTokenizerFast if file else AutoTokenizer


def _set_template(
    tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str] | None, variables: Mapping[str, Any]
) -> None:
    """Set the chat template of a tokenizer (a dictionary if it has several).

    The templates get `variables`, and read a fixed date instead of the clock.
    """
    templates = template if isinstance(template, dict) else {"": template or ""}
    if any(map(reads_clock, templates.values())):
        tokenizer.init_kwargs[TEMPLATE_DATE] = CLOCK.date().isoformat()
    templates = {key: set_variables(fix_clock(text), variables) for key, text in templates.items()}
    tokenizer.chat_template = templates if isinstance(template, dict) else templates[""] or None


def _check_unchanged(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a trained model's tokenizer is not the one that packed the training data."""
    recorded = tokenizer.init_kwargs.get(PACKED_FINGERPRINT)
    if recorded is not None and not has_fingerprint(tokenizer, recorded):
        raise UserError(
            "the tokenizer or chat template differs from the one that packed the model's training data; "
            "restore the exported files"
        )


def _check_for_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a tokenizer lacks something that packing and training need."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("not a fast tokenizer (no tokenizer.json can be made of it)")
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; give one with: pack --chat_template FILE")
    try:
        _compile_jinja_template(tokenizer.get_chat_template())
    except Exception as error:  # jinja2's errors, or several templates of which none is the default
        raise UserError(f"the chat template cannot be used ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer lacks an eos token; set eos_token in tokenizer_config.json")


def is_path(name: str) -> bool:
    """Return whether a name that is no directory is a path rather than a Hub model ID (NAME or ORGANIZATION/NAME)."""
    return name.startswith((".", os.sep)) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hex SHA-256 of the chat template."""
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hex SHA-256 of everything that determines a conversation's tokens.

    This is the vocabulary, the tokenization rules, the special tokens that a chat template can use, and the chat
    template. It does not depend on the machine, the path of the tokenizer, or the padding and truncation of earlier
    calls. The decoder and the post-processor, which adds special tokens only if `add_special_tokens` is true, are left
    out: they do not change the tokens, and versions of the libraries write them differently.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("padding", "truncation", "post_processor", "decoder"):
        content.pop(part, None)
    names = tokenizer.special_tokens_map
    content["special"] = {key: str(token) for key, token in names.items() if not isinstance(token, list | dict)}
    return _hash_with_template(content, tokenizer)


def has_fingerprint(tokenizer: PreTrainedTokenizerBase, recorded: str) -> bool:
    """Return whether a recorded fingerprint is that of a tokenizer. Accepts fingerprints of earlier versions."""
    return recorded in (fingerprint(tokenizer), _earlier_fingerprint(tokenizer))


def _earlier_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the fingerprint of earlier versions, which covered the post-processor and the decoder."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["padding"] = content["truncation"] = None
    content["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return _hash_with_template(content, tokenizer)


def _hash_with_template(content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    content["chat_template"] = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a tokenizer directory atomically. Raises UserError if `output` is not empty or cannot be written."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output}: already exists; remove it or give another --output")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None

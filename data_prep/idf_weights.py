"""Inverse document frequency weights, which reduce the influence of tokens that occur in most responses.

Shape letters: V vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from transformers import AutoConfig

from data_prep.shards.format import IGNORE, PackedRow, ShardSet
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError


def count_documents(rows: Iterable[PackedRow], vocab_size: int) -> tuple[np.ndarray, int]:
    """Count the responses that contain each token.

    Args:
        rows: Packed rows; a response is the target tokens of one sequence. The copies of a split group's pivot are one
            response.
        vocab_size: V.

    Returns:
        int64 [V] the number of responses that contain the token, and the number of responses.

    Raises:
        UserError: There are fewer than two responses, or a token id is V or larger.
    """
    counts, responses = np.zeros(vocab_size), 0.0
    for row in rows:
        copies = np.ones_like(row.seq_lens) if row.copies is None else row.copies
        for labels, number in zip(np.split(row.labels, np.cumsum(row.seq_lens)[:-1]), copies, strict=True):
            ids = np.unique(labels[labels != IGNORE])
            if len(ids) and ids[-1] >= vocab_size:
                raise UserError(
                    f"token id {ids[-1]} is out of range for a vocabulary of {vocab_size}; "
                    "pass the --model whose tokenizer these shards were packed with"
                )
            counts[ids] += 1 / number
            responses += (len(ids) > 0) / number
    whole = round(responses)
    if whole < 2:
        raise UserError(f"{whole} responses are too few to compute document frequencies; pack more data")
    return np.rint(counts).astype(np.int64), whole


def inverse_document_frequency(counts: np.ndarray, responses: int) -> np.ndarray:
    """Compute the inverse document frequency of every token, counting each response as a document.

    A token that occurs in S_v of S responses has the weight log(S / S_v) / log S: 0 if it occurs in all responses, 1
    if it occurs in only one. A token that occurs in no response has weight 0, because nothing is known about it, and a
    large vocabulary has many such tokens.

    Args:
        counts: int [V] S_v.
        responses: S, at least 2.

    Returns:
        float32 [V].
    """
    weights = np.log(responses / np.maximum(counts, 1)) / np.log(responses)
    return np.where(counts > 0, weights, 0).astype(np.float32)


def model_vocab_size(name: str) -> int:
    """Return the vocabulary size of a model, or of a tokenizer if the directory contains no model.

    The vocabulary of a model can be larger than that of its tokenizer.

    Args:
        name: Directory or Hub model ID of a model or tokenizer.

    Raises:
        UserError: `name` is neither a model nor a tokenizer.
    """
    try:
        return int(AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError):
        return len(load_tokenizer(name))  # type: ignore[arg-type]


def write_weights(shards: Path, output: Path, vocab_size: int) -> tuple[int, int]:
    """Compute the weights from a shard directory and write the safetensors file for `loss.vocabulary_weights`.

    Args:
        shards: Shard directory.
        output: File to write, with a tensor `weights` [V].
        vocab_size: V.

    Returns:
        The number of tokens that occur in more than one response, and of those that occur in none.

    Raises:
        UserError: The shards are unreadable, a token id is V or larger, or the file cannot be written.
    """
    rows = ShardSet.open(shards)
    try:
        counts, responses = count_documents(rows, vocab_size)
    except UserError as error:
        raise UserError(f"{shards}: {error}") from None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, save({"weights": inverse_document_frequency(counts, responses)}))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    return int((counts > 1).sum()), int((counts == 0).sum())

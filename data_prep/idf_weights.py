"""Vocabulary weights: how telling each token is, so that what all responses share does not dominate their summaries.

Shape letters: V vocabulary, S responses.
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


def inverse_document_frequency(rows: Iterable[PackedRow], vocab_size: int) -> np.ndarray:
    """float32 [V] of log(S / responses that hold the token) / log S: 0 for a token of all, 1 for one of a single one.

    A token that no response holds has 1. Raises UserError for fewer than two responses or an id of V or more.
    """
    counts, responses = np.zeros(vocab_size, np.int64), 0
    for row in rows:
        for labels in np.split(row.labels, np.cumsum(row.seq_lens)[:-1]):
            ids = np.unique(labels[labels != IGNORE])
            if len(ids) and ids[-1] >= vocab_size:
                raise UserError(
                    f"token id {ids[-1]} does not fit a vocabulary of {vocab_size}; name the model they were packed for"
                )
            counts[ids] += 1
            responses += len(ids) > 0
    if responses < 2:
        raise UserError(f"{responses} responses cannot tell frequent tokens from rare ones; pack more data")
    return (np.log(responses / np.maximum(counts, 1)) / np.log(responses)).astype(np.float32)


def model_vocab_size(name: str) -> int:
    """Entries of a model's vocabulary, which can be more than its tokenizer has; of a tokenizer alone, its size.

    Raises UserError where there is neither.
    """
    try:
        return int(AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError):
        return len(load_tokenizer(name))  # type: ignore[arg-type]


def write_weights(shards: Path, output: Path, vocab_size: int) -> int:
    """Write them for a shard directory as the safetensors file that `loss.vocabulary_weights` names.

    Returns the number of tokens that more than one response holds. Raises UserError for bad shards or an output that
    cannot be written.
    """
    rows = ShardSet.open(shards)
    try:
        weights = inverse_document_frequency(rows, vocab_size)
    except UserError as error:
        raise UserError(f"{shards}: {error}") from None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, save({"weights": weights}))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    return int((weights < 1).sum())

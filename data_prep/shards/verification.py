"""Checks every hash and every invariant of a shard directory."""

from pathlib import Path

import numpy as np

from data_prep.shards.format import IGNORE, PIVOT, TRANSLATION, PackedRow, ShardSet
from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.common.errors import UserError


def verify(path: Path, tokenizer: str | None = None) -> ShardSet:
    """Check a shard directory, and, where one is given, that `tokenizer` is the one it was made with.

    Raises UserError naming the shard and row of the first thing that is wrong.
    """
    shards = ShardSet.open(path)
    manifest = shards.manifest
    if tokenizer is not None:
        check_tokenizer(path, manifest, tokenizer)
    index = 0
    for shard in manifest["shards"]:
        counts = dict.fromkeys(("rows", "tokens", "supervised_tokens", "sequences", "pairs"), 0)
        for number in range(shard["rows"]):
            row = shards[index]
            fault = row_fault(row, manifest)
            if fault:
                raise UserError(f"{path / shard['name']} row {number + 1}: {fault}; pack again")
            counts["rows"] += 1
            counts["tokens"] += len(row.input_ids)
            counts["supervised_tokens"] += int(np.count_nonzero(row.labels != IGNORE))
            counts["sequences"] += len(row.seq_lens)
            counts["pairs"] += row.role.count(TRANSLATION)
            index += 1
        for key, value in counts.items():
            if shard[key] != value:
                raise UserError(f"{path / shard['name']}: {value} {key}, the manifest says {shard[key]}; pack again")
    return shards


def check_tokenizer(path: Path, manifest: dict, tokenizer: str) -> None:
    """Raise UserError where `tokenizer` is not the one the shards were made with."""
    if fingerprint(load_tokenizer(tokenizer)) != manifest["tokenizer"]["fingerprint"]:
        raise UserError(
            f"{path}: packed with another tokenizer than {tokenizer}; pack again, or give the one used then"
        )


def row_fault(row: PackedRow, manifest: dict) -> str | None:
    """What is wrong with a row, or None."""
    ids, labels = row.input_ids, row.labels
    if len(ids) != len(labels) or int(row.seq_lens.sum()) != len(ids) or (row.seq_lens < 1).any():
        return "input_ids, labels and seq_lens disagree in length"
    if not len(row.seq_lens) == len(row.pair_id) == len(row.lang) == len(row.role):
        return "seq_lens, pair_id, lang and role disagree in length"
    if len(ids) > manifest["max_seq_length"]:
        return f"{len(ids)} tokens, more than max_seq_length {manifest['max_seq_length']}"
    if len(ids) and not 0 <= ids.min() <= ids.max() < manifest["tokenizer"]["vocab_size"]:
        return "a token outside the vocabulary"
    if ((labels != ids) & (labels != IGNORE)).any():
        return "a label that is neither its token nor -100"
    starts = np.cumsum(row.seq_lens) - row.seq_lens
    if (labels[starts] != IGNORE).any():
        return "a supervised first token"
    if not np.logical_or.reduceat(labels != IGNORE, starts).all():
        return "a sequence without supervised token"
    return _group_fault(row, manifest["pivot"])


def _group_fault(row: PackedRow, pivot: str) -> str | None:
    group: set[str] = set()
    current = None
    for pair_id, lang, role in zip(row.pair_id, row.lang, row.role, strict=True):
        if (role == PIVOT) != (lang == pivot) or role not in (PIVOT, TRANSLATION):
            return f"role {role} for language {lang} where the pivot is {pivot}"
        if role == PIVOT:
            current, group = pair_id, set()
        elif pair_id != current:
            return f"a translation of pair_id {pair_id} away from its pivot"
        if lang in group:
            return f"language {lang} twice in group {pair_id}"
        group.add(lang)
    return None

"""Check all hashes and invariants of a shard directory."""

from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.shards.format import COUNTS, IGNORE, MANIFEST, PIVOT, TRANSLATION, PackedRow, ShardSet, count_rows
from data_prep.shards.repeated_pivots import find_copies_error
from data_prep.tokenization.tokenizer import load_packed_tokenizer
from pipeline.common.errors import UserError


def verify(path: Path, tokenizer: str | None = None) -> ShardSet:
    """Check a shard directory and return its rows.

    Args:
        path: Shard directory.
        tokenizer: If given, also check that this tokenizer (directory or Hub model ID) packed the shards.

    Raises:
        UserError: A check failed; the message names the first such shard and row.
    """
    shards = ShardSet.open(path)
    manifest = shards.manifest
    if tokenizer is not None:
        load_packed_tokenizer(tokenizer, path, manifest)
    start, totals, per_language = 0, Counter(dict.fromkeys(COUNTS, 0)), Counter[tuple[str, str]]()
    for shard in manifest["shards"]:
        counts = Counter(dict.fromkeys(COUNTS, 0))
        for number in range(shard["rows"]):
            row = shards[start + number]
            if error := _find_row_error(row, manifest):
                raise UserError(f"{path / shard['name']} row {number + 1}: {error}; pack again")
            counts.update(count_rows([row]))
            per_language.update(_count_languages(row))
        for key, value in counts.items():
            if shard[key] != value:
                raise UserError(f"{path / shard['name']}: {value} {key}, but {shard[key]} in the manifest; pack again")
        start += shard["rows"]
        totals.update(counts)
    if error := _find_totals_error(manifest, totals, per_language):
        raise UserError(f"{path / MANIFEST}: {error}; pack again")
    if error := find_copies_error(shards):
        raise UserError(f"{path}: {error}; pack again")
    return shards


def _count_languages(row: PackedRow) -> Counter[tuple[str, str]]:
    """Count the sequences, tokens and target tokens of each language."""
    counts: Counter[tuple[str, str]] = Counter()
    ends = np.cumsum(row.seq_lens)
    for lang, start, end in zip(row.lang, ends - row.seq_lens, ends, strict=True):
        supervised = int(np.count_nonzero(row.labels[start:end] != IGNORE))
        numbers = {"sequences": 1, "tokens": int(end - start), "supervised_tokens": supervised}
        counts.update({(lang, name): number for name, number in numbers.items()})
    return counts


def _find_totals_error(manifest: dict, totals: Counter, per_language: Counter[tuple[str, str]]) -> str | None:
    """Return a description of the first count of the manifest that is not the sum over the rows, or None."""
    for name, value in totals.items():
        if manifest["totals"][name] != value:
            return f"{value} {name}, but {manifest['totals'][name]} in `totals`"
    for (lang, name), value in per_language.items():
        recorded = manifest["per_language"].get(lang, {}).get(name)
        if recorded != value:
            return f"{value} {name} in {lang}, but {recorded} in `per_language`"
    return None


def _find_row_error(row: PackedRow, manifest: dict) -> str | None:
    """Return a description of the first error of a row, or None."""
    ids, labels = row.input_ids, row.labels
    if len(ids) != len(labels) or int(row.seq_lens.sum()) != len(ids):
        return "input_ids, labels and seq_lens disagree in length"
    if (row.seq_lens < 1).any():
        return "a sequence without tokens"
    if not len(row.seq_lens) == len(row.pair_id) == len(row.lang) == len(row.role):
        return "seq_lens, pair_id, lang and role disagree in length"
    if row.copies is not None and len(row.copies) != len(row.seq_lens):
        return "seq_lens and copies disagree in length"
    if len(ids) > manifest["max_seq_length"]:
        return f"{len(ids)} tokens, more than max_seq_length {manifest['max_seq_length']}"
    if len(ids) and not 0 <= ids.min() <= ids.max() < manifest["tokenizer"]["vocab_size"]:
        return "a token id outside the vocabulary"
    if ((labels != ids) & (labels != IGNORE)).any():
        return "a label that is neither its token nor -100"
    starts = np.cumsum(row.seq_lens) - row.seq_lens
    if (labels[starts] != IGNORE).any():
        return "a supervised first token"
    if not np.logical_or.reduceat(labels != IGNORE, starts).all():
        return "a sequence without a supervised token"
    return _find_group_error(row, manifest["pivot"])


def _find_group_error(row: PackedRow, pivot: str) -> str | None:
    if row.copies is not None and (row.copies[np.array(row.role) != PIVOT] != 1).any():
        return "a translation with several copies"
    group: set[str] = set()
    current = None
    for pair_id, lang, role in zip(row.pair_id, row.lang, row.role, strict=True):
        if (role == PIVOT) != (lang == pivot) or role not in (PIVOT, TRANSLATION):
            return f"role {role} for language {lang}, but the pivot is {pivot}"
        if role == PIVOT:
            current, group = pair_id, set()
        elif pair_id != current:
            return f"a translation of pair_id {pair_id} that does not follow its pivot"
        if lang in group:
            return f"language {lang} twice in group {pair_id}"
        group.add(lang)
    return None

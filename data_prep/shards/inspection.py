"""Print packed rows as text: the language and role of each sequence, and its text with the prompt in brackets."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from data_prep.shards.format import IGNORE, PackedRow, ShardSet
from data_prep.shards.repeated_pivots import count_repeated_pivots
from data_prep.tokenization.tokenizer import load_packed_tokenizer
from pipeline.common.errors import UserError


def inspect_row(path: Path, tokenizer: str, index: int) -> None:
    """Print a row of a shard directory.

    Args:
        path: Shard directory.
        tokenizer: Directory or Hub model ID of the tokenizer that packed the shards.
        index: Number of the row, from 0.

    Raises:
        UserError: The directory is unreadable, there is no such row, or a different tokenizer packed the shards.
    """
    shards = ShardSet.open(path, check_hashes=False)
    packed_with = load_packed_tokenizer(tokenizer, path, shards.manifest)
    if not 0 <= index < len(shards):
        raise UserError(f"{path}: no row {index}; the rows are 0 to {len(shards) - 1}")
    row = shards[index]
    console = Console()
    console.print(f"row {index}: {len(row.input_ids)} of {shards.manifest['max_seq_length']} tokens", highlight=False)
    console.print(str(count_repeated_pivots(shards)), highlight=False, soft_wrap=True)
    for text in _render_row(row, packed_with):
        console.print(text, soft_wrap=True)


def _render_row(row: PackedRow, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Return one text per sequence: a heading, then its text. Parts that are not targets are dimmed and in ⟦ ⟧."""
    texts = []
    stop = 0
    copies = [1] * len(row.seq_lens) if row.copies is None else row.copies.tolist()
    sequences = zip(row.seq_lens.tolist(), row.pair_id, row.lang, row.role, copies, strict=True)
    for length, pair_id, lang, role, number in sequences:
        start, stop = stop, stop + length
        ids, supervised = row.input_ids[start:stop], row.labels[start:stop] != IGNORE
        text = Text()
        repeated = f", one of {number} copies" if number > 1 else ""
        heading = f"{pair_id} {lang} {role}, {length} tokens, {int(supervised.sum())} supervised{repeated}\n"
        text.append(heading, style="bold")
        for part in np.split(np.arange(length), np.flatnonzero(np.diff(supervised)) + 1):
            decoded = tokenizer.decode(ids[part].tolist())
            if supervised[part[0]]:
                text.append(str(decoded), style="green")
            else:
                text.append(f"⟦{decoded}⟧", style="dim")
        texts.append(text)
    return texts

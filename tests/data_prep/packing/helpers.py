"""Packing runs in this process, and comparison of their outputs."""

import json
from pathlib import Path

from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks

EN, FR = ("p", "en", "q", "a"), ("p", "fr", "q", "a")
STEPS = ["tokenize_split", "write_row_plan", "write_shard"]  # functions that finish a part of each step
SMALL = PackSettings(max_seq_length=1024, rows_per_shard=8, window_bytes=20_000)


def run(inputs, tokenizer_dir, output, settings=SMALL):
    """Pack on a single rank and return the manifest."""
    return pack(inputs, str(tokenizer_dir), output, settings, Ranks())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))}


def write_records(path: Path, *records: tuple[str, str, str, str]) -> Path:
    """Write records of (pair_id, lang, question, answer) as JSON Lines."""
    keys = ("pair_id", "lang", "question", "answer")
    path.write_text("".join(json.dumps(dict(zip(keys, record, strict=True))) + "\n" for record in records))
    return path

"""Packing: canonical records in, a shard directory out; the same bytes for any number of ranks, and after any kill.

Three steps, each cut into parts that ranks share (part i belongs to rank i modulo their number) and that are finished
once their last file is there:

    pieces   an input piece -> its tokens and index                      (pieces.py)
    windows  the groups of one range of pair keys -> rows                (windows.py)
    shards   so many rows -> one Parquet file                            (here)

All of it lies in OUTPUT.partial until the manifest is written; then its shards folder is renamed to OUTPUT.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_prep.packing.pieces import TokenReader, index_file, read_window, tokenize_piece
from data_prep.packing.plan_files import count_languages, packed_rows, read_plan, write_plan
from data_prep.packing.windows import Limits, Window
from data_prep.ranks import AgreedError, Ranks
from data_prep.records import Piece, describe, plan_pieces
from data_prep.shards.format import FORMAT_VERSION, MANIFEST, read_manifest, shard_name, write_shard
from data_prep.tokenization.chat_template import ChatEncoder
from data_prep.tokenization.tokenizer import chat_template_hash, fingerprint, load_tokenizer
from pipeline.common.atomic_io import sha256_file, write_json
from pipeline.common.errors import UserError

PARTS = ("pieces", "windows", "entries", "shards")  # folders of the work in progress

T = TypeVar("T")

WINDOW_BYTES = (8 << 20, 64 << 20)  # a thousand groups or more: what more would add to the fill is not worth memory
PACKER_VERSION = 3  # raise it when the same input and settings give other bytes


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a shard directory, besides its sources and tokenizer.

    max_seq_length: tokens of a row at most. pivot: language every group is aligned to. seed: of the order of groups and
    rows. max_sequences_per_row: 0 for no limit. truncate: cut pairs that fit no row instead of dropping them.
    rows_per_shard: of every shard but the last. window_bytes: input bytes whose groups are packed together, with
    which memory per rank grows; 0 for 1/16 of the input within WINDOW_BYTES.
    """

    max_seq_length: int = 2048
    pivot: str = "en"
    seed: int = 0
    max_sequences_per_row: int = 0
    truncate: bool = False
    rows_per_shard: int = 1024
    window_bytes: int = 0

    def __post_init__(self) -> None:
        least = {"max_seq_length": 1, "rows_per_shard": 1, "max_sequences_per_row": 0, "window_bytes": 0, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UserError(f"--{name} must be at least {number}, not {getattr(self, name)}")
        if self.seed >= 1 << 64:
            raise UserError(f"--seed must be below 2**64, not {self.seed}")

    def limits(self) -> Limits:
        return Limits(self.max_seq_length, self.max_sequences_per_row, self.truncate)


def pack(inputs: list[Path], tokenizer: str, output: Path, settings: PackSettings, ranks: Ranks) -> dict[str, Any]:
    """Pack what is not packed yet; returns the manifest. Call it on every rank.

    Raises UserError for bad input, for an output made with other settings, and for a full disk.
    """
    packer = Packer(inputs, output, settings, ranks)
    ranks.agree(lambda: _naming_the_file(lambda: packer.read_sources(tokenizer)))
    packer.describe_run()
    if ranks.agree(packer.finished):
        packer.clear_away()
        return read_manifest(output)
    try:
        ranks.agree(lambda: _naming_the_file(packer.prepare))
        _naming_the_file(packer.run)
    finally:
        packer.unlock()
    return read_manifest(output)


def _naming_the_file(work: Callable[[], T]) -> T:
    """Do `work`; what the operating system refuses becomes one line. Unfinished work stays, to go on with."""
    try:
        return work()
    except OSError as error:
        raise UserError(f"{error.filename or 'output'}: {error.strerror or error}; mend it and run again") from None


class Packer:
    """One packing run on one rank: what it reads, where it writes, and its three steps."""

    def __init__(self, inputs: list[Path], output: Path, settings: PackSettings, ranks: Ranks):
        self.inputs, self.output, self.settings, self.ranks = inputs, output, settings, ranks
        self.work = output.with_name(output.name + ".partial")
        self.pieces: list[Piece] = []
        self.windows = 0
        self.hashes: dict[int, str] = {}  # of the inputs that this rank read
        self._lock: int | None = None

    def read_sources(self, tokenizer: str) -> None:
        """Load the tokenizer, cut the inputs into pieces, hash this rank's part of them. No collective in here."""
        self.pieces = plan_pieces(self.inputs)
        self.tokenizer = load_tokenizer(tokenizer)
        size = sum(path.stat().st_size for path in self.inputs)
        window = self.settings.window_bytes or min(max(size // 16, WINDOW_BYTES[0]), WINDOW_BYTES[1])
        self.windows = -(-size // window)
        mine = range(self.ranks.rank, len(self.inputs), self.ranks.size)
        self.hashes = {i: sha256_file(self.inputs[i]) for i in mine}

    def unlock(self) -> None:
        """Let other runs work on the same output."""
        if self._lock is not None:
            os.close(self._lock)

    def describe_run(self) -> None:
        """Make the manifest's head, everything that decides the bytes: what a rerun is compared with."""
        hashes = self.ranks.all_merge(self.hashes)
        self.head = {
            "format_version": FORMAT_VERSION,
            "packer_version": PACKER_VERSION,
            **asdict(self.settings),
            "tokenizer": {
                "fingerprint": fingerprint(self.tokenizer),
                "vocab_size": len(self.tokenizer),
                "pad_token_id": self.tokenizer.pad_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
            },
            "chat_template_sha256": chat_template_hash(self.tokenizer),
            "sources": [{"name": path.name, "sha256": hashes[i]} for i, path in enumerate(self.inputs)],
        }

    def run(self) -> None:
        """Do what is not done yet. Raises UserError for bad input; the work is of no use then and goes."""
        try:
            self._tokenize()
            rows, drops = self._assign()
        except UserError:
            if self.ranks.size == 1:  # else other ranks are still writing there
                shutil.rmtree(self.work, ignore_errors=True)
            raise
        shards = self._write(rows)
        if self.ranks.rank == 0:
            self._publish(shards, drops)
        self.ranks.all_gather(None)  # nobody leaves before the output is there

    def finished(self) -> bool:
        """Is the output there already? Raises UserError where it was made with other settings or is not ours."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return False
        _refuse_other(self.head, read_manifest(self.output), self.output)
        return True

    def clear_away(self) -> None:
        """Remove the work of a run that was ended after the output was there."""
        if self.ranks.rank == 0 and (self.work / "settings.json").is_file():
            shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self) -> None:
        """Make the work folders, or find those of a run that was ended early."""
        if self.ranks.rank != 0:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.work}: another run is packing there; wait for it, or end it") from None
        head = self.work / "settings.json"
        if not head.is_file() and any(self.work.iterdir()):
            raise UserError(f"{self.work}: in the way, and no unfinished work of ours; remove it")
        if head.is_file() and json.loads(head.read_text("utf-8")) != self.head:
            print(f"{self.work}: unfinished work of other settings or input, starting over", flush=True)
            for name in PARTS:
                shutil.rmtree(self.work / name, ignore_errors=True)
        write_json(head, self.head)
        for name in PARTS:
            (self.work / name).mkdir(exist_ok=True)

    def _mine(self, number: int, unit: str, done: Callable[[int], Path]) -> Iterator[int]:
        """This rank's parts that are not finished, with a progress bar where a person watches."""
        mine = [i for i in range(self.ranks.rank, number, self.ranks.size) if not done(i).is_file()]
        yield from tqdm(mine, desc=unit, unit=" parts", disable=None if self.ranks.rank == 0 else True)

    def _tokenize(self) -> None:
        folder, encoder = self.work / "pieces", ChatEncoder(self.tokenizer)
        for i in self._mine(len(self.pieces), "tokenize", lambda i: index_file(folder, i)):
            tokenize_piece(self.pieces[i], i, folder, encoder, self.windows, self.settings.seed)
        self.ranks.all_gather(None)

    def _assign(self) -> tuple[list[int], Counter]:
        """Assign groups to rows; returns the number of rows per window and the drops of all windows."""
        folder = self.work / "windows"
        reader = TokenReader(self.work / "pieces")
        for window in self._mine(self.windows, "assign", lambda i: folder / f"{i:05d}.json"):
            table = read_window(self.work / "pieces", len(self.pieces), window)
            found = Window(table, self.settings.pivot, self._describe, reader.supervised_within)
            limits = self.settings.limits()
            units = [unit for group in found.groups() for unit in found.fit(group, limits)]
            rows = found.rows(units, limits, f"rows {self.settings.seed} {window}")
            write_plan(folder / f"{window:05d}.arrow", rows)
            number = int(rows["row"][-1].as_py()) + 1 if len(rows) else 0
            drops = sorted([lang, reason, number] for (lang, reason), number in found.drops.items())
            write_json(folder / f"{window:05d}.json", {"rows": number, "drops": drops})
        self.ranks.all_gather(None)
        done = [json.loads((folder / f"{window:05d}.json").read_text()) for window in range(self.windows)]
        total: Counter = Counter()
        for part in done:
            total.update({(lang, reason): number for lang, reason, number in part["drops"]})
        if not any(part["rows"] for part in done):
            raise AgreedError(f"nothing is left to pack: no pair fits {self.settings.max_seq_length} tokens")
        return [part["rows"] for part in done], total

    def _describe(self, piece: int, place: int) -> str:
        return describe(self.pieces[piece].path, place)

    def _write(self, rows: list[int]) -> int:
        """Write the shards and, per shard, its manifest entry with counts per language; returns their number."""
        starts = np.cumsum([0, *rows])
        size = self.settings.rows_per_shard
        shards = -(-int(starts[-1]) // size)
        folder = self.work / "entries"
        reader = TokenReader(self.work / "pieces")
        for shard in self._mine(shards, "write", lambda i: folder / f"{i:05d}.json"):
            planned = read_plan(self.work / "windows", starts, shard * size, min((shard + 1) * size, int(starts[-1])))
            packed = packed_rows(planned, reader, self.settings.pivot)
            entry = write_shard(self.work / "shards" / shard_name(shard), packed)
            write_json(folder / f"{shard:05d}.json", {**entry, "languages": count_languages(planned, packed)})
        self.ranks.all_gather(None)
        return shards

    def _publish(self, shards: int, drops: Counter) -> None:
        entries = [json.loads((self.work / "entries" / f"{i:05d}.json").read_text("utf-8")) for i in range(shards)]
        languages: dict[str, Counter] = {}
        for entry in entries:
            for lang, counts in entry.pop("languages").items():
                languages.setdefault(lang, Counter()).update(counts)
        for lang, _ in drops:
            languages.setdefault(lang, Counter())
        keys = ("rows", "tokens", "supervised_tokens", "sequences", "pairs")
        totals = {key: sum(entry[key] for entry in entries) for key in keys}
        manifest = {
            **self.head,
            "languages": sorted(languages),
            "shards": entries,
            "totals": totals,
            "per_language": {lang: dict(counts) for lang, counts in languages.items()},
            "drops": _nested(drops),
            "fill": totals["tokens"] / (totals["rows"] * self.settings.max_seq_length),
        }
        write_json(self.work / "shards" / MANIFEST, manifest)
        os.rename(self.work / "shards", self.output)
        shutil.rmtree(self.work)


def _refuse_other(head: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    for key, value in head.items():
        if found.get(key) != value:
            raise UserError(
                f"{where}: made with another `{key}`; remove it, restore that setting, or name another output"
            )


def _nested(drops: Counter) -> dict[str, dict[str, int]]:
    """Drops as {reason: {language: number}}."""
    result: dict[str, dict[str, int]] = {}
    for (lang, reason), number in drops.items():
        result.setdefault(reason, {})[lang] = number
    return result

"""Packing: canonical records in, a shard directory out; the same bytes for any number of ranks, and after any kill.

Three steps, each cut into parts that ranks share (part i belongs to rank i modulo their number) and that are finished
once their last file is there:

    pieces   an input piece -> its tokens and index                      (pieces.py)
    windows  the groups of one range of pair keys -> rows                (windows.py)
    shards   so many rows -> one Parquet file                            (here)

All of it lies in OUTPUT.partial until the manifest is written; then its shards folder is renamed to OUTPUT.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_prep.chat import ChatEncoder
from data_prep.errors import UserError
from data_prep.pieces import TokenReader, index_file, read_window, tokenize_piece
from data_prep.ranks import Ranks
from data_prep.records import describe, plan_pieces
from data_prep.shards import (
    FORMAT_VERSION,
    IGNORE,
    MANIFEST,
    PIVOT,
    TRANSLATION,
    PackedRow,
    read_manifest,
    sha256_file,
    shard_name,
    write_json,
    write_shard,
)
from data_prep.tokenizer import chat_template_hash, fingerprint, load_tokenizer
from data_prep.windows import Limits, Member, fit_group, form_groups, plan_rows

PACKER_VERSION = 1  # raise it when the same input and settings give other bytes

PLAN = pa.schema(
    [
        ("row", pa.int32()),
        ("pair_id", pa.string()),
        ("lang", pa.string()),
        ("piece", pa.int32()),
        ("place", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("characters", pa.int32()),
    ]
)


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a shard directory, besides its sources and tokenizer.

    max_seq_length: tokens of a row at most. pivot: language every group is aligned to. seed: of the order of groups and
    rows. max_sequences_per_row: 0 for no limit. truncate: cut pairs that fit no row instead of dropping them.
    rows_per_shard: of every shard but the last. window_bytes: input bytes whose groups are packed together; memory per
    rank grows with it, and input smaller than it is packed globally.
    """

    max_seq_length: int = 2048
    pivot: str = "en"
    seed: int = 0
    max_sequences_per_row: int = 0
    truncate: bool = False
    rows_per_shard: int = 1024
    window_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "rows_per_shard", "window_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.max_sequences_per_row < 0 or not 0 <= self.seed < 1 << 64:
            raise UserError("--max_sequences_per_row must not be negative, and --seed must lie in 0 .. 2**64 - 1")

    def limits(self) -> Limits:
        return Limits(self.max_seq_length, self.max_sequences_per_row, self.truncate)


class Packer:
    """One packing run on one rank: what it reads, where it writes, and its three steps."""

    def __init__(self, inputs: list[Path], tokenizer: str, output: Path, settings: PackSettings, ranks: Ranks):
        self.output, self.settings, self.ranks = output, settings, ranks
        self.work = output.with_name(output.name + ".partial")
        self.pieces = plan_pieces(inputs)
        self.tokenizer = load_tokenizer(tokenizer)
        sources = ranks.all_merge({i: sha256_file(inputs[i]) for i in range(ranks.rank, len(inputs), ranks.size)})
        self.head = {
            "format_version": FORMAT_VERSION,
            "packer_version": PACKER_VERSION,
            **asdict(settings),
            "tokenizer": {
                "fingerprint": fingerprint(self.tokenizer),
                "vocab_size": len(self.tokenizer),
                "pad_token_id": self.tokenizer.pad_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
            },
            "chat_template_sha256": chat_template_hash(self.tokenizer),
            "sources": [{"name": path.name, "sha256": sources[i]} for i, path in enumerate(inputs)],
        }
        size = sum(path.stat().st_size for path in inputs)
        self.windows = -(-size // settings.window_bytes)

    def run(self) -> dict[str, Any]:
        """Pack what is not packed yet; returns the manifest.

        Raises UserError for bad input, for an output or unfinished work of other settings, and for a full disk.
        """
        try:
            if self._finished():
                return read_manifest(self.output)
            self._prepare()
            self._tokenize()
            rows, drops = self._assign()
            shards = self._write(rows)
            if self.ranks.rank == 0:
                self._publish(shards, drops)
            self.ranks.all_gather(None)  # nobody leaves before the output is there
            return read_manifest(self.output)
        except OSError as error:
            raise UserError(f"{error.filename or self.output}: {error.strerror}; mend it and run again") from None
        except UserError:
            if self.ranks.rank == 0 and self.ranks.size == 1:
                shutil.rmtree(self.work, ignore_errors=True)
            raise

    def _finished(self) -> bool:
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return False
        _refuse_other(self.head, read_manifest(self.output), self.output)
        return True

    def _prepare(self) -> None:
        """Make the work folders, or find those of a run that was ended early."""
        head = self.work / "settings.json"
        if self.ranks.rank == 0:
            if head.is_file():
                _refuse_other(self.head, json.loads(head.read_text("utf-8")), self.work)
            for name in ("pieces", "windows", "entries", "shards"):
                (self.work / name).mkdir(parents=True, exist_ok=True)
            write_json(head, self.head)
        self.ranks.all_gather(None)

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
            entries = read_window(self.work / "pieces", len(self.pieces), window)
            groups = form_groups(entries, self.settings.pivot, self._describe)
            drops: Counter = Counter()
            limits = self.settings.limits()

            def supervised_within(member: Member, length: int) -> int:
                return int(np.count_nonzero(reader.read(member.piece, member.offset, length) < 0))

            units = [unit for group in groups for unit in fit_group(group, limits, supervised_within, drops)]
            rows = plan_rows(units, limits, f"rows {self.settings.seed} {window}")
            _write_plan(folder / f"{window:05d}.arrow", rows)
            found = sorted([lang, reason, number] for (lang, reason), number in drops.items())
            write_json(folder / f"{window:05d}.json", {"rows": len(rows), "groups": len(groups), "drops": found})
        self.ranks.all_gather(None)
        done = [json.loads((folder / f"{window:05d}.json").read_text()) for window in range(self.windows)]
        drops = Counter()
        for part in done:
            drops.update({(lang, reason): number for lang, reason, number in part["drops"]})
        return [part["rows"] for part in done], drops

    def _describe(self, piece: int, place: int) -> str:
        return describe(self.pieces[piece].path, place)

    def _write(self, rows: list[int]) -> int:
        """Write the shards and, per shard, its manifest entry with counts per language; returns their number."""
        starts = np.cumsum([0, *rows])
        if not starts[-1]:
            raise UserError(f"nothing is left to pack: no pair fits {self.settings.max_seq_length} tokens")
        size = self.settings.rows_per_shard
        shards = -(-int(starts[-1]) // size)
        folder = self.work / "entries"
        reader = TokenReader(self.work / "pieces")
        for shard in self._mine(shards, "write", lambda i: folder / f"{i:05d}.json"):
            planned = _read_plan(self.work / "windows", starts, shard * size, min((shard + 1) * size, int(starts[-1])))
            packed = [self._row(members, reader) for members in planned]
            entry = write_shard(self.work / "shards" / shard_name(shard), packed)
            write_json(folder / f"{shard:05d}.json", {**entry, "languages": _count(planned, packed)})
        self.ranks.all_gather(None)
        return shards

    def _row(self, members: list[Member], reader: TokenReader) -> PackedRow:
        coded = np.concatenate([reader.read(member.piece, member.offset, member.length) for member in members])
        ids = np.where(coded < 0, ~coded, coded)
        return PackedRow(
            input_ids=ids,
            labels=np.where(coded < 0, ids, np.int32(IGNORE)),
            seq_lens=np.array([member.length for member in members], np.int32),
            pair_id=[member.pair_id for member in members],
            lang=[member.lang for member in members],
            role=[PIVOT if member.lang == self.settings.pivot else TRANSLATION for member in members],
        )

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


def _count(planned: list[list[Member]], packed: list[PackedRow]) -> dict[str, dict[str, int]]:
    """Per language: sequences, tokens, supervised tokens, characters."""
    counts: dict[str, Counter] = {}
    for members, row in zip(planned, packed, strict=True):
        starts = np.concatenate(([0], np.cumsum(row.seq_lens)[:-1]))
        supervised = np.add.reduceat(row.labels != IGNORE, starts, dtype=np.int64)
        for member, number in zip(members, supervised, strict=True):
            lang = counts.setdefault(member.lang, Counter())
            lang["sequences"] += 1
            lang["tokens"] += member.length
            lang["supervised_tokens"] += int(number)
            lang["characters"] += member.characters
    return {lang: dict(count) for lang, count in counts.items()}


def _write_plan(path: Path, rows: list[list[Member]]) -> None:
    numbers = [number for number, members in enumerate(rows) for _ in members]
    members = [member for row in rows for member in row]
    columns = [numbers, *zip(*members, strict=True)] if members else [[]] * len(PLAN)
    batch = pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, PLAN, strict=True)], PLAN)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, PLAN) as writer:
        writer.write_batch(batch)


def _read_plan(folder: Path, starts: np.ndarray, first: int, stop: int) -> list[list[Member]]:
    """Rows first .. stop of all windows' rows in order; window w holds rows starts[w] .. starts[w + 1]."""
    rows: list[list[Member]] = []
    for window in range(int(np.searchsorted(starts, first, side="right")) - 1, len(starts) - 1):
        if starts[window] >= stop:
            break
        with pa.memory_map(str(folder / f"{window:05d}.arrow")) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
            numbers = batch.column("row").to_numpy()
            low, high = np.searchsorted(numbers, [first - starts[window], stop - starts[window]])
            columns = batch.slice(low, high - low).to_pydict()
        row_numbers = columns.pop("row")
        before = -1
        for number, member in zip(row_numbers, zip(*columns.values(), strict=True), strict=True):
            if number != before:
                rows.append([])
                before = number
            rows[-1].append(Member(*member))
    return rows

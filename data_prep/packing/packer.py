"""Pack canonical records into a shard directory.

The output is byte-identical for any number of ranks and after any interruption. Packing has three steps. Each step is
divided into parts, and rank r processes every part i with i % ranks == r. A part is finished if its last file exists.

    tokenize  an input split -> its tokens and index          (token_files.py)
    assign    the groups of one packing window -> rows        (windows.py, row_plans.py)
    write     a range of rows -> one Parquet file             (this module)

All files are in OUTPUT.partial until the manifest is written. Then the folder of shards is renamed to OUTPUT.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_prep.packing.row_plans import build_rows, count_languages, plan_file, read_row_plan, write_row_plan
from data_prep.packing.settings import PackSettings, check_same_settings
from data_prep.packing.token_files import (
    UNKNOWN_LANGUAGE,
    TokenReader,
    count_skipped,
    index_file,
    read_window,
    tokenize_split,
    warn_of_other_prompt,
)
from data_prep.packing.windows import TOO_LONG, TRUNCATED, Limits, Window
from data_prep.ranks import AgreedError, Ranks
from data_prep.readers import InputSplit, locate, split_inputs
from data_prep.records import spelling_error
from data_prep.shards.format import FORMAT_VERSION, read_manifest, shard_name, write_manifest, write_shard
from data_prep.tokenization.chat_template import ChatEncoder
from data_prep.tokenization.template_rendering import check_variables
from data_prep.tokenization.tokenizer import TEMPLATE_DATE, chat_template_hash, fingerprint, load_tokenizer
from pipeline.common.atomic_io import sha256_file, write_json
from pipeline.common.errors import StorageError, UserError

FOLDERS = ("pieces", "windows", "entries", "shards")  # of the work folder
PACKER_VERSION = 6  # increment it whenever a change alters the bytes for the same input and settings
BAD_RECORD = "bad_record"  # drop reason of records that cannot be packed
T = TypeVar("T")


def pack(inputs: list[Path], tokenizer: str, output: Path, settings: PackSettings, ranks: Ranks) -> dict[str, Any]:
    """Pack canonical records into a shard directory, or finish an interrupted run.

    Collective: all ranks must call it.

    Args:
        inputs: JSON Lines and Parquet files of canonical records.
        tokenizer: Tokenizer directory, Hub model ID or SentencePiece model file.
        output: Shard directory to write.
        settings: Settings of the run.
        ranks: The ranks that share the work.

    Returns:
        The manifest of the shard directory.

    Raises:
        UserError: The input is malformed, `output` was packed with different settings, or the disk is full.
    """
    packer = Packer(inputs, output, settings, ranks)
    ranks.agree(lambda: _report_os_errors(lambda: packer.read_sources(tokenizer)))
    packer.build_head()
    if ranks.agree(lambda: _report_os_errors(packer.is_finished)):
        packer.remove_leftovers()
        return read_manifest(output)
    try:
        ranks.agree(lambda: _report_os_errors(packer.prepare_work_folder))
        _report_os_errors(packer.run)
    finally:
        packer.unlock()
    return read_manifest(output)


def _report_os_errors(work: Callable[[], T]) -> T:
    """Return `work()`, converting an OSError to a UserError. The work folder is kept so that a rerun can continue."""
    try:
        return work()
    except OSError as error:
        raise UserError(f"{error.filename or 'output'}: {error.strerror or error}; fix it and run again") from None


class Packer:
    """A packing run on one rank: its inputs, its work folder and its three steps."""

    def __init__(self, inputs: list[Path], output: Path, settings: PackSettings, ranks: Ranks):
        # The work folder is then on the file system of the link's target.
        output = output.resolve() if output.is_symlink() else output
        self.inputs, self.output, self.settings, self.ranks = inputs, output, settings, ranks
        self.limits = Limits.from_settings(settings)
        self.work = output.with_name(output.name + ".partial")
        self.splits: list[InputSplit] = []
        self.windows = 0
        self.hashes: dict[int, str] = {}  # by input index; only the inputs that this rank hashed
        self._lock: int | None = None

    def read_sources(self, tokenizer: str) -> None:
        """Load the tokenizer, split the inputs, and hash the inputs assigned to this rank. Not collective."""
        self.splits = split_inputs(self.inputs)
        template, variables = self.settings.chat_template, self.settings.chat_template_kwargs
        self.tokenizer = load_tokenizer(tokenizer, chat_template=template, chat_template_kwargs=variables)
        check_variables(self.tokenizer.get_chat_template(), variables)
        self.windows = self.settings.count_windows(sum(path.stat().st_size for path in self.inputs))
        local = range(self.ranks.rank, len(self.inputs), self.ranks.size)
        self.hashes = {i: sha256_file(self.inputs[i]) for i in local}

    def unlock(self) -> None:
        """Release the lock on the work folder."""
        if self._lock is not None:
            os.close(self._lock)

    def build_head(self) -> None:
        """Build the head of the manifest: everything that determines the output bytes.

        Collective: all ranks must call it.
        """
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
            "chat_template_date": self.tokenizer.init_kwargs.get(TEMPLATE_DATE),
            "sources": [{"name": path.name, "sha256": hashes[i]} for i, path in enumerate(self.inputs)],
        }

    def run(self) -> None:
        """Run all unfinished steps.

        If the input cannot be packed (UserError), a single rank deletes the work folder. With several ranks it stays,
        because other ranks may still be writing to it. It also stays after a failed read, so that a rerun can continue.
        """
        try:
            self._tokenize_splits()
            rows, drops, has_split_groups = self._assign_rows()
        except UserError as error:
            if self.ranks.size == 1 and not isinstance(error, StorageError):
                shutil.rmtree(self.work, ignore_errors=True)
            raise
        shards = self._write_shards(rows, has_split_groups)
        if self.ranks.rank == 0:
            self._publish(shards, drops)
        self.ranks.all_gather(None)  # no rank returns before the output exists

    def is_finished(self) -> bool:
        """Return whether the output exists. Raises UserError if it was packed with different settings."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return False
        check_same_settings(self.head, read_manifest(self.output), self.output)
        return True

    def remove_leftovers(self) -> None:
        """Delete the work folder of a run that was interrupted after it published the output."""
        if self.ranks.rank == 0 and (self.work / "settings.json").is_file():
            shutil.rmtree(self.work, ignore_errors=True)

    def prepare_work_folder(self) -> None:
        """On rank 0, lock the work folder, then create it or check that the interrupted run can be resumed."""
        if self.ranks.rank != 0:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.work}: another run is packing in this folder; wait for it or stop it") from None
        head, content = self.work / "settings.json", {**self.head, "splits": [list(split[1:]) for split in self.splits]}
        if not head.is_file() and any(self.work.iterdir()):
            raise UserError(f"{self.work}: exists and is not the work folder of a packing run; remove it")
        if head.is_file() and json.loads(head.read_text("utf-8")) != content:
            print(f"{self.work}: was made with different settings or input; starting again", flush=True)
            for name in FOLDERS:
                shutil.rmtree(self.work / name, ignore_errors=True)
        write_json(head, content)
        for name in FOLDERS:
            (self.work / name).mkdir(exist_ok=True)

    def _local_parts(self, number: int, description: str, last_file: Callable[[int], Path]) -> Iterator[int]:
        """Yield this rank's unfinished parts of a step. Shows a progress bar if attached to a terminal."""
        local = range(self.ranks.rank, number, self.ranks.size)
        unfinished = [i for i in local if not last_file(i).is_file()]
        yield from tqdm(unfinished, desc=description, unit=" parts", disable=None if self.ranks.rank == 0 else True)

    def _tokenize_splits(self) -> None:
        folder, encoder = self.work / "pieces", ChatEncoder(self.tokenizer, self.settings.supervise)
        if self.ranks.rank == 0:
            warn_of_other_prompt(self.splits[0], encoder)
        for i in self._local_parts(len(self.splits), "tokenize", lambda i: index_file(folder, i)):
            tokenize_split(self.splits[i], i, folder, encoder, self.windows, self.settings)
        self.ranks.all_gather(None)

    def _assign_rows(self) -> tuple[list[int], Counter, bool]:
        """Assign groups to rows.

        Returns:
            The number of rows in each window, the drops of all windows, and whether any group is split.
        """
        folder = self.work / "windows"
        reader = TokenReader(self.work / "pieces")

        def summary_file(number: int) -> Path:
            return folder / f"{number:05d}.json"

        for number in self._local_parts(self.windows, "assign", summary_file):
            table = read_window(self.work / "pieces", len(self.splits), number)
            window = Window(table, self.settings.pivot, self._locate, reader.count_supervised)
            groups = window.groups(skip=self.settings.on_bad_record == "skip")
            subgroups = [subgroup for group in groups for subgroup in window.fit(group, self.limits)]
            plan = window.rows(subgroups, self.limits, f"rows {self.settings.seed} {number}")
            write_row_plan(plan_file(folder, number), plan)
            rows = int(plan["row"][-1].as_py()) + 1 if len(plan) else 0
            drops = sorted([lang, reason, count] for (lang, reason), count in window.drops.items())
            split = bool((plan["copies"].to_numpy() > 1).any())
            languages = sorted(set(table["lang"].to_pylist()))
            write_json(summary_file(number), {"rows": rows, "drops": drops, "split": split, "languages": languages})
        self.ranks.all_gather(None)
        summaries = [json.loads(summary_file(number).read_text("utf-8")) for number in range(self.windows)]
        if error := spelling_error(lang for summary in summaries for lang in summary["languages"]):
            raise AgreedError(f"--input: {error}")
        skipped = count_skipped(self.work / "pieces", len(self.splits))
        total = Counter({(lang, BAD_RECORD): count for lang, count in skipped.items()})
        for summary in summaries:
            total.update({(lang, reason): count for lang, reason, count in summary["drops"]})
        if not any(summary["rows"] for summary in summaries):
            reason = ", ".join(f"{other} {sum(n.values())}" for other, n in _group_by_reason(total).items())
            if total and all(other in (TOO_LONG, TRUNCATED) for _, other in total):
                reason = f"no pair fits in {self.settings.max_seq_length} tokens; raise --max_seq_length"
            raise AgreedError(f"nothing is left to pack: {reason or 'the input has no records'}")
        return [summary["rows"] for summary in summaries], total, any(summary["split"] for summary in summaries)

    def _locate(self, split: int, position: int) -> str:
        return locate(self.splits[split].path, position)

    def _entry_file(self, shard: int) -> Path:
        return self.work / "entries" / f"{shard:05d}.json"

    def _write_shards(self, rows_per_window: list[int], with_copies: bool) -> int:
        """Write the shards and their manifest entries (with counts per language). Return the number of shards."""
        starts = np.cumsum([0, *rows_per_window])
        size = self.settings.rows_per_shard
        shards = -(-int(starts[-1]) // size)
        reader = TokenReader(self.work / "pieces")
        for shard in self._local_parts(shards, "write", self._entry_file):
            plan = read_row_plan(self.work / "windows", starts, shard * size, min((shard + 1) * size, int(starts[-1])))
            packed = build_rows(plan, reader, self.settings.pivot, with_copies)
            entry = write_shard(self.work / "shards" / shard_name(shard), packed)
            write_json(self._entry_file(shard), {**entry, "languages": count_languages(plan, packed)})
        self.ranks.all_gather(None)  # wait for all ranks
        return shards

    def _publish(self, shards: int, drops: Counter) -> None:
        """Write the manifest and rename the folder of shards to the output."""
        entries = [json.loads(self._entry_file(shard).read_text("utf-8")) for shard in range(shards)]
        per_language: dict[str, Counter] = {}
        for entry in entries:
            for lang, counts in entry.pop("languages").items():
                per_language.setdefault(lang, Counter()).update(counts)
        for lang in {lang for lang, _ in drops} - {UNKNOWN_LANGUAGE}:
            per_language.setdefault(lang, Counter())
        write_manifest(self.work / "shards", self.head, entries, per_language, _group_by_reason(drops))
        os.rename(self.work / "shards", self.output)
        shutil.rmtree(self.work)


def _group_by_reason(drops: Counter) -> dict[str, dict[str, int]]:
    """Convert drops by (language, reason) to {reason: {language: number}}."""
    result: dict[str, dict[str, int]] = {}
    for (lang, reason), number in drops.items():
        result.setdefault(reason, {})[lang] = number
    return result

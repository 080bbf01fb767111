"""Second step of packing: check the groups of one window, split long groups, and assign them to rows."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.packing.bin_packing import pack_bins
from pipeline.common.errors import UserError

TOO_LONG, TRUNCATED = "too_long", "truncated"

# Indices of sequences in the table of the window: the pivot first, then the translations by language. A subgroup is the
# part of a group that is packed into one row, or the whole group if it fits.
ExampleGroup = list[int]


class Limits(NamedTuple):
    """Limits of a row.

    Attributes:
        tokens: Maximum number of tokens.
        sequences: Maximum number of sequences, 0 for no limit.
        truncate: Whether pairs that are too long are truncated instead of dropped.
    """

    tokens: int
    sequences: int = 0
    truncate: bool = False


class Window:
    """The sequences of one packing window.

    Args:
        table: Index of the sequences, sorted by group and language; see `token_files.read_window`.
        pivot: Language that every group must have.
        locate: `locate(split, position)` returns the file and row of a record, for error messages.
        count_supervised: `count_supervised(split, offset, length)` returns the number of target tokens among the first
            `length` tokens of a sequence.

    Attributes:
        drops: Number of sequences that were dropped or truncated, by (language, reason).
    """

    def __init__(
        self,
        table: pa.Table,
        pivot: str,
        locate: Callable[[int, int], str],
        count_supervised: Callable[[int, int, int], int],
    ):
        self.table, self.pivot = table, pivot
        self.drops: Counter = Counter()
        self._locate, self._count_supervised = locate, count_supervised
        self._pair_id, self._lang = (table.column(name).to_pylist() for name in ("pair_id", "lang"))
        self._length, self._supervised = (table.column(name).to_pylist() for name in ("length", "supervised"))

    def groups(self) -> list[ExampleGroup]:
        """Return all groups in file order, which is the order of their hashed `pair_id`.

        Raises UserError if a group has no pivot or has two records in the same language.
        """
        ids, langs = self._pair_id, self._lang
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
        groups = []
        for start, stop in pairwise([*starts, len(ids)]):
            members = list(range(start, stop))
            for first, second in pairwise(members):
                if langs[first] == langs[second]:
                    raise UserError(
                        f"{self._location(second)}: pair_id {ids[second]} has the language {langs[second]} twice "
                        f"(first in {self._location(first)}); remove one of them"
                    )
            try:
                members.insert(0, members.pop(langs.index(self.pivot, start, stop) - start))
            except ValueError:
                raise UserError(
                    f"{self._location(start)}: pair_id {ids[start]} has no {self.pivot} record, only "
                    f"{', '.join(langs[start:stop])}; add its {self.pivot} record or give another --pivot"
                ) from None
            groups.append(members)
        return groups

    def _location(self, member: int) -> str:
        return self._locate(self.table["piece"][member].as_py(), self.table["place"][member].as_py())

    def fit(self, group: ExampleGroup, limits: Limits) -> list[ExampleGroup]:
        """Split a group into subgroups that each fit in one row and start with the pivot.

        A group that fits in one row is returned unchanged. The translations of a longer group are distributed over
        subgroups by first fit. If a pivot and a translation together do not fit in a row, the translation is dropped
        or, with `truncate`, both are truncated. `drops` counts both cases.
        """
        length = self._length
        if sum(length[i] for i in group) <= limits.tokens and not 0 < limits.sequences < len(group):
            return [group]
        pivot, *translations = group
        if limits.truncate:
            longest = max((length[i] for i in translations), default=0)
            self._truncate(pivot, max(limits.tokens // 2, limits.tokens - longest))
            for member in translations:
                self._truncate(member, limits.tokens - length[pivot])
        if length[pivot] > limits.tokens or not self._supervised[pivot]:
            self.drops.update((self._lang[i], TOO_LONG) for i in group)
            return []
        subgroups: list[ExampleGroup] = []
        for member in translations:
            fits_a_row = length[pivot] + length[member] <= limits.tokens and limits.sequences != 1
            if not fits_a_row or not self._supervised[member]:
                self.drops[self._lang[member], TOO_LONG] += 1
                continue
            for subgroup in subgroups:
                fits = sum(length[i] for i in subgroup) + length[member] <= limits.tokens
                if fits and not 0 < limits.sequences <= len(subgroup):
                    subgroup.append(member)
                    break
            else:
                subgroups.append([pivot, member])
        return subgroups or [[pivot]]

    def _truncate(self, member: int, length: int) -> None:
        """Truncate a sequence to `length` tokens. It may have no target token left."""
        if self._length[member] > length:
            split, offset = (self.table[name][member].as_py() for name in ("piece", "offset"))
            self._length[member] = length
            self._supervised[member] = self._count_supervised(split, offset, length)
            if self._supervised[member]:
                self.drops[self._lang[member], TRUNCATED] += 1

    def rows(self, subgroups: list[ExampleGroup], limits: Limits, seed: str) -> pa.Table:
        """Pack subgroups into as few rows as possible.

        Args:
            subgroups: The results of `fit` for all groups.
            limits: The limits that were passed to `fit`.
            seed: Determines the order of the rows.

        Returns:
            The table of the window, sorted by row. The added column `row` is the number of the row, and `copies` the
            number of times that the sequence occurs in the table.
        """
        lengths = [sum(self._length[i] for i in subgroup) for subgroup in subgroups]
        bins = pack_bins(lengths, limits.tokens, [len(subgroup) for subgroup in subgroups], limits.sequences)
        random.Random(seed).shuffle(bins)
        rows = [[i for item in sorted(items) for i in subgroups[item]] for items in bins]
        chosen = np.array([i for row in rows for i in row], np.int64)
        numbers = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])
        truncated_lengths = np.array(self._length, np.int32)[chosen]
        copies = np.bincount(chosen, minlength=1)[chosen].astype(np.int32)
        table = self.table.drop_columns(["key", "length", "supervised"]).take(chosen)
        for name, column in (("length", truncated_lengths), ("copies", copies), ("row", numbers)):
            table = table.append_column(name, pa.array(column))
        return table

"""Second half of packing: the groups of one window, checked, split where over-long, and assigned to rows."""

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

Group = list[int]  # members as places in the window's table: the pivot first, then the translations by language


class Limits(NamedTuple):
    """What a row may hold: tokens, and sequences (0: any number); over-long pairs are dropped or truncated."""

    tokens: int
    sequences: int = 0
    truncate: bool = False


class Window:
    """The sequences of one window in a table sorted by group and language; see `pieces.read_window`.

    describe(piece, place) names a record in messages. supervised_within(piece, offset, n) counts the supervised tokens
    among the first n of a sequence.
    """

    def __init__(
        self,
        table: pa.Table,
        pivot: str,
        describe: Callable[[int, int], str],
        supervised_within: Callable[[int, int, int], int],
    ):
        self.table, self.pivot = table, pivot
        self.drops: Counter = Counter()  # (language, reason) -> number
        self._describe, self._supervised_within = describe, supervised_within
        self._pair_id, self._lang = (table.column(name).to_pylist() for name in ("pair_id", "lang"))
        self._length, self._supervised = (table.column(name).to_pylist() for name in ("length", "supervised"))

    def groups(self) -> list[Group]:
        """All groups, in the order of their keys.

        Raises UserError for a language that is twice in a group, and for a group without pivot.
        """
        ids, langs = self._pair_id, self._lang
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
        groups = []
        for start, stop in pairwise([*starts, len(ids)]):
            members = list(range(start, stop))
            for one, other in pairwise(members):
                if langs[one] == langs[other]:
                    raise UserError(
                        f"{self._name(other)}: pair_id {ids[other]} has the language {langs[other]} twice "
                        f"(first in {self._name(one)}); a group holds each language once"
                    )
            try:
                members.insert(0, members.pop(langs.index(self.pivot, start, stop) - start))
            except ValueError:
                raise UserError(
                    f"{self._name(start)}: pair_id {ids[start]} has no {self.pivot} record, only "
                    f"{', '.join(langs[start:stop])}; add the pivot, or name another one with --pivot"
                ) from None
            groups.append(members)
        return groups

    def _name(self, member: int) -> str:
        return self._describe(self.table["piece"][member].as_py(), self.table["place"][member].as_py())

    def fit(self, group: Group, limits: Limits) -> list[Group]:
        """The group as units that each fit a row, all beginning with the pivot; what fits none goes to `drops`.

        A group that fits stays whole. Else its translations share as few units as first fit gives. A pair that is too
        long by itself loses its translation or, with `truncate`, the ends of both.
        """
        length = self._length
        if sum(length[i] for i in group) <= limits.tokens and not 0 < limits.sequences < len(group):
            return [group]
        pivot, *translations = group
        if limits.truncate:
            longest = max((length[i] for i in translations), default=0)
            self._cut(pivot, max(limits.tokens // 2, limits.tokens - longest))
            for member in translations:
                self._cut(member, limits.tokens - length[pivot])
        if length[pivot] > limits.tokens or not self._supervised[pivot]:
            self.drops.update((self._lang[i], TOO_LONG) for i in group)
            return []
        units: list[Group] = []
        for member in translations:
            fits_a_row = length[pivot] + length[member] <= limits.tokens and limits.sequences != 1
            if not fits_a_row or not self._supervised[member]:
                self.drops[self._lang[member], TOO_LONG] += 1
                continue
            for unit in units:
                fits = sum(length[i] for i in unit) + length[member] <= limits.tokens
                if fits and not 0 < limits.sequences <= len(unit):
                    unit.append(member)
                    break
            else:
                units.append([pivot, member])
        return units or [[pivot]]

    def _cut(self, member: int, length: int) -> None:
        """Shorten a sequence to `length` tokens; it may be left without supervised ones."""
        if self._length[member] > length:
            piece, offset = (self.table[name][member].as_py() for name in ("piece", "offset"))
            self._length[member] = length
            self._supervised[member] = self._supervised_within(piece, offset, length)
            if self._supervised[member]:
                self.drops[self._lang[member], TRUNCATED] += 1

    def rows(self, units: list[Group], limits: Limits, seed: str) -> pa.Table:
        """The sequences of few rows of whole units, in random order: the table with a column `row`."""
        lengths = [sum(self._length[i] for i in unit) for unit in units]
        bins = pack_bins(lengths, limits.tokens, [len(unit) for unit in units], limits.sequences)
        random.Random(seed).shuffle(bins)
        rows = [[i for unit in sorted(found) for i in units[unit]] for found in bins]
        chosen = np.array([i for row in rows for i in row], np.int64)
        numbers = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])
        lengths_now = np.array(self._length, np.int32)[chosen]
        table = self.table.drop_columns(["key", "length", "supervised"]).take(chosen)
        return table.append_column("length", pa.array(lengths_now)).append_column("row", pa.array(numbers))

"""Second step of packing: check the groups of one window, split long groups, and assign them to rows."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.packing.bin_packing import Bins, pack_bins
from data_prep.packing.settings import PackSettings
from data_prep.records import is_number
from pipeline.common.errors import UserError

TOO_LONG, TRUNCATED, NO_TRANSLATION = "too_long", "truncated", "no_translation"
NO_PIVOT, LANGUAGE_TWICE, GOLD_DIFFERS = "no_pivot", "language_twice", "gold_differs"  # as in `convert`

# Indices of sequences in the table of the window: the pivot first, then the translations by language. A subgroup is the
# part of a group that is packed into one row, or the whole group if it fits.
ExampleGroup = list[int]


class Limits(NamedTuple):
    """Limits of a row.

    Attributes:
        tokens: Maximum number of tokens.
        sequences: Maximum number of sequences, 0 for no limit.
        truncate: Whether pairs that are too long are truncated instead of dropped.
        translations: Maximum number of translations of one example, 0 for no limit.
        pairs_only: Whether pivots without a translation are dropped.
    """

    tokens: int
    sequences: int = 0
    truncate: bool = False
    translations: int = 0
    pairs_only: bool = False

    @classmethod
    def from_settings(cls, settings: PackSettings) -> "Limits":
        """Return the limits of a packing run."""
        return cls(
            settings.max_seq_length,
            settings.max_sequences_per_row,
            settings.truncate,
            settings.translations_per_row,
            settings.pairs_only,
        )


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
        self._gold = table.column("gold").to_pylist()
        self._length, self._supervised = (table.column(name).to_pylist() for name in ("length", "supervised"))

    def groups(self, skip: bool = False) -> list[ExampleGroup]:
        """Return all groups in file order, which is the order of their hashed `pair_id`.

        Args:
            skip: Whether to drop and count records that do not fit their group instead of raising an error. These are
                repeated records in a language, translations with another gold answer than the pivot, and groups
                without pivot.

        Raises:
            UserError: A group has no pivot, two records in the same language, or different gold answers.
        """
        ids = self._pair_id
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
        groups = []
        for start, stop in pairwise([*starts, len(ids)]):
            members = [start]
            for member in range(start + 1, stop):
                if self._lang[member] != self._lang[members[-1]]:
                    members.append(member)
                elif skip:
                    self.drops[self._lang[member], LANGUAGE_TWICE] += 1
                else:
                    raise self._twice(members[-1], member)
            pivots = [member for member in members if self._lang[member] == self.pivot]
            if pivots:
                others = [member for member in members if member != pivots[0]]
                groups.append([pivots[0], *self._with_equal_gold(pivots[0], others, skip)])
            elif skip:
                self.drops.update((self._lang[member], NO_PIVOT) for member in members)
            else:
                raise UserError(
                    f"{self._location(start)}: pair_id {ids[start]} has no {self.pivot} record, only "
                    f"{', '.join(self._lang[member] for member in members)}; "
                    f"add its {self.pivot} record or give another --pivot"
                )
        return groups

    def _twice(self, first: int, second: int) -> UserError:
        """Return the error for two records of a group in the same language."""
        advice = "remove one of them"
        if self._source(first) != self._source(second):
            advice = "pair_ids must be unique across files, except for translations of the same example"
        return UserError(
            f"{self._location(second)}: pair_id {self._pair_id[second]} has the language {self._lang[second]} twice "
            f"(first in {self._location(first)}); {advice}"
        )

    def _with_equal_gold(self, pivot: int, translations: list[int], skip: bool) -> list[int]:
        """Return the translations without those whose gold answer contradicts that of the group.

        Two golds contradict each other if they are different numbers. Other golds may be translated.
        """
        reference, equal = pivot, []
        for member in translations:
            if self._gold[reference] is None:
                reference = member
            golds = {self._gold[member], self._gold[reference]}
            if len(golds) == 1 or not all(map(is_number, golds)):
                equal.append(member)
            elif skip:
                self.drops[self._lang[member], GOLD_DIFFERS] += 1
            else:
                raise UserError(
                    f"{self._location(member)}: pair_id {self._pair_id[member]} has the gold {self._gold[member]}, but "
                    f"{self._gold[reference]} in {self._location(reference)}; "
                    "translations of one example must have the same gold, and different examples different pair_ids"
                )
        return equal

    def _source(self, member: int) -> str:
        return self._location(member).rpartition(" row ")[0]

    def _location(self, member: int) -> str:
        return self._locate(self.table["piece"][member].as_py(), self.table["place"][member].as_py())

    def fit(self, group: ExampleGroup, limits: Limits) -> list[ExampleGroup]:
        """Split a group into subgroups that each fit in one row and start with the pivot.

        A group that fits in one row is returned unchanged. The translations of a longer group, or of one with more
        than `limits.translations`, are distributed over subgroups by first fit. If a pivot and a translation together
        do not fit in a row, the translation is dropped or, with `truncate`, both are truncated. With `pairs_only`, a
        pivot without translations is dropped. `drops` counts these cases.
        """
        length = self._length
        pivot, *translations = group
        most = min((n for n in (limits.sequences - 1, limits.translations) if n > 0), default=len(translations))
        if limits.sequences == 1:
            most = 0
        if sum(length[i] for i in group) <= limits.tokens and len(translations) <= most:
            return self._pairs([group], limits)
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
            fits_a_row = length[pivot] + length[member] <= limits.tokens and most > 0
            if not fits_a_row or not self._supervised[member]:
                self.drops[self._lang[member], TOO_LONG] += 1
                continue
            for subgroup in subgroups:
                fits = sum(length[i] for i in subgroup) + length[member] <= limits.tokens
                if fits and len(subgroup) <= most:
                    subgroup.append(member)
                    break
            else:
                subgroups.append([pivot, member])
        return self._pairs(subgroups or [[pivot]], limits)

    def _pairs(self, subgroups: list[ExampleGroup], limits: Limits) -> list[ExampleGroup]:
        """Drop a pivot without translations if `pairs_only` is set."""
        if limits.pairs_only and len(subgroups[0]) == 1:
            self.drops[self._lang[subgroups[0][0]], NO_TRANSLATION] += 1
            return []
        return subgroups

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
        if limits.translations:
            bins = separate(bins, [subgroup[0] for subgroup in subgroups])
        random.Random(seed).shuffle(bins)
        rows = [[i for item in sorted(items) for i in subgroups[item]] for items in bins]
        chosen = np.array([i for row in rows for i in row], np.int64)
        numbers = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])
        truncated_lengths = np.array(self._length, np.int32)[chosen]
        copies = np.bincount(chosen, minlength=1)[chosen].astype(np.int32)
        table = self.table.drop_columns(["key", "length", "supervised", "gold"]).take(chosen)
        for name, column in (("length", truncated_lengths), ("copies", copies), ("row", numbers)):
            table = table.append_column(name, pa.array(column))
        return table


def separate(bins: Bins, pivots: list[int]) -> Bins:
    """Move subgroups to rows of their own if an earlier subgroup of the same row has the same pivot."""
    result, moved = [], []
    for items in bins:
        first = {pivots[item]: item for item in reversed(items)}
        result.append([item for item in items if first[pivots[item]] == item])
        moved += [[item] for item in items if first[pivots[item]] != item]
    return result + moved

"""Second half of packing: the groups of one window, checked, split where over-long, and assigned to rows."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.packing import best_fit_decreasing

TOO_LONG, TRUNCATED = "too_long", "truncated"


class Member(NamedTuple):
    """One sequence of a group, and where its tokens are."""

    pair_id: str
    lang: str
    piece: int
    place: int
    offset: int
    length: int
    supervised: int
    characters: int


Group = list[Member]  # the pivot first, then the translations by language


class Limits(NamedTuple):
    """What a row may hold: tokens, and sequences (0: any number); over-long pairs are dropped or truncated."""

    tokens: int
    sequences: int = 0
    truncate: bool = False


def form_groups(entries: Sequence[tuple], pivot: str, describe: Callable[[int, int], str]) -> list[Group]:
    """Groups of one window in the order of their keys, from index entries (piece, key, pair_id, lang, ...).

    describe(piece, place) names a record. Raises UserError for a language twice in a group or a group without pivot.
    """
    groups = []
    for _, same in groupby(sorted(entries, key=lambda e: (e[1], e[2], e[3], e[0], e[4])), key=lambda e: (e[1], e[2])):
        group = [Member(pair_id, lang, piece, *rest) for piece, _, pair_id, lang, *rest in same]
        for one, other in pairwise(group):
            if one.lang == other.lang:
                raise UserError(
                    f"{describe(other.piece, other.place)}: pair_id {other.pair_id} has the language {other.lang} "
                    f"twice (first in {describe(one.piece, one.place)}); a group holds each language once"
                )
        if all(member.lang != pivot for member in group):
            raise UserError(
                f"{describe(group[0].piece, group[0].place)}: pair_id {group[0].pair_id} has no {pivot} record, only "
                f"{', '.join(member.lang for member in group)}; add the pivot, or name another one with --pivot"
            )
        groups.append(sorted(group, key=lambda member: member.lang != pivot))
    return groups


def fit_group(
    group: Group, limits: Limits, supervised_within: Callable[[Member, int], int], drops: Counter
) -> list[Group]:
    """The group as units that each fit a row, all beginning with the pivot; what fits no row is counted in `drops`.

    A group that fits stays whole. Else its translations share as few units as first fit gives. A pair that is too long
    by itself loses its translation, or, with `truncate`, the ends of both. supervised_within(member, n) counts the
    supervised tokens among the first n. Keys of `drops` are (language, reason).
    """
    pivot, *translations = group
    if limits.truncate:
        longest = max((member.length for member in translations), default=0)
        pivot = _cut(pivot, max(limits.tokens // 2, limits.tokens - longest), supervised_within, drops)
        room = limits.tokens - pivot.length
        translations = [_cut(member, room, supervised_within, drops) for member in translations]
    if not 0 < pivot.length <= limits.tokens or not pivot.supervised:
        drops.update((member.lang, TOO_LONG) for member in group)
        return []
    units: list[Group] = []
    for member in translations:
        if pivot.length + member.length > limits.tokens or not member.supervised or limits.sequences == 1:
            drops[member.lang, TOO_LONG] += 1
            continue
        for unit in units:
            fits = sum(other.length for other in unit) + member.length <= limits.tokens
            if fits and (not limits.sequences or len(unit) < limits.sequences):
                unit.append(member)
                break
        else:
            units.append([pivot, member])
    return units or [[pivot]]


def _cut(member: Member, length: int, supervised_within: Callable[[Member, int], int], drops: Counter) -> Member:
    if member.length <= length:
        return member
    left = supervised_within(member, length)
    if left:
        drops[member.lang, TRUNCATED] += 1
    return member._replace(length=length, supervised=left)


def plan_rows(units: Sequence[Group], limits: Limits, seed: str) -> list[Group]:
    """Rows of whole units, best-fit decreasing, in random order."""
    lengths = [sum(member.length for member in unit) for unit in units]
    bins = best_fit_decreasing(lengths, limits.tokens, [len(unit) for unit in units], limits.sequences)
    random.Random(seed).shuffle(bins)
    return [[member for unit in sorted(row) for member in units[unit]] for row in bins]

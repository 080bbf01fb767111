"""Bin packing of whole groups: lengths in, bins out, the same for the same lengths.

Best-fit decreasing first: within a percent of the optimum where many items go into a bin. Groups in ten languages are
long, two or three to a bin, and then it leaves two to four percent; a search over a few bins at a time gets most back.
"""

import random
from collections.abc import Sequence

NEAR = 1.005  # bins over the lower bound at which the search ends
PASSES = 12  # of the search, over as many handfuls of bins as there are bins, and at least HANDFULS
HANDFULS = 1000
PATIENCE = 3  # passes without a bin saved after which it ends

Bins = list[list[int]]


def pack_bins(lengths: Sequence[int], capacity: int, counts: Sequence[int] = (), limit: int = 0) -> Bins:
    """Pack items into few bins.

    lengths: tokens of each item, each at most `capacity`. counts: sequences of each item, at most `limit` a bin where
    `limit` is not 0. Returns bins as lists of item numbers.
    """
    bins = best_fit_decreasing(lengths, capacity, counts, limit)
    return bins if limit else improve(bins, lengths, capacity)


def best_fit_decreasing(lengths: Sequence[int], capacity: int, counts: Sequence[int] = (), limit: int = 0) -> Bins:
    """Each item goes to the fullest bin that still holds it, longest item first; arguments as for `pack_bins`.

    Equal lengths keep their order, so the result depends on the order of items only among equals.
    """
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    bins: Bins = []
    held: list[int] = []  # sequences in each bin
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by free tokens, a stack each
    rooms = 0  # bit r is set where by_room[r] has a bin: the lowest bit at or above a length is the best fit
    for item in order:
        length, count = lengths[item], counts[item] if limit else 0
        if not 0 < length <= capacity or count > limit:
            raise ValueError(f"item {item} of {length} tokens, {count} sequences does not fit a bin")
        room, place = _find(by_room, rooms, length, held, limit - count)
        if room < 0:
            place, room = len(bins), capacity
            bins.append([])
            held.append(0)
        else:
            by_room[room].remove(place)
            if not by_room[room]:
                rooms &= ~(1 << room)
        bins[place].append(item)
        held[place] += count
        if room > length and (not limit or held[place] < limit):
            by_room[room - length].append(place)
            rooms |= 1 << (room - length)
    return bins


def _find(by_room: list[list[int]], rooms: int, length: int, held: list[int], most: int) -> tuple[int, int]:
    """The least sufficient room and a bin with it that holds at most `most` sequences; (-1, -1) where there is none."""
    left = rooms >> length << length
    while left:
        room = (left & -left).bit_length() - 1
        for place in reversed(by_room[room]):
            if held[place] <= most:
                return room, place
        left &= left - 1
    return -1, -1


def improve(bins: Bins, lengths: Sequence[int], capacity: int) -> Bins:
    """Repack handfuls of bins until their number is near the lower bound or no more falls.

    A handful is one rather empty bin and a few at random. Its items are packed anew, each bin as full as they allow;
    the result stays where it has fewer bins, or as many that are less evenly filled.
    """
    rng = random.Random(0)
    bound = max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))
    fills = [sum(lengths[item] for item in found) for found in bins]
    waited = 0
    for _ in range(PASSES):
        before = len(bins)
        for _ in range(max(before, HANDFULS)):
            if len(bins) <= NEAR * bound or len(bins) < 3:
                return bins
            emptiest = min((rng.randrange(len(bins)) for _ in range(32)), key=fills.__getitem__)
            chosen = {emptiest, *(rng.randrange(len(bins)) for _ in range(rng.randint(2, 6)))}
            old = sorted(chosen, reverse=True)
            new = _fill_one_by_one([item for place in old for item in bins[place]], lengths, capacity)
            new_fills = [sum(lengths[item] for item in found) for found in new]
            gain = sum(fill**2 for fill in new_fills) - sum(fills[place] ** 2 for place in old)
            if len(new) < len(old) or (len(new) == len(old) and gain >= 0):
                for place in old:  # from the back, so that the last bin may take the place of each
                    bins[place], fills[place] = bins[-1], fills[-1]
                    bins.pop()
                    fills.pop()
                bins += new
                fills += new_fills
        waited = waited + 1 if len(bins) == before else 0
        if waited == PATIENCE:
            break
    return bins


def _fill_one_by_one(items: list[int], lengths: Sequence[int], capacity: int) -> Bins:
    """Bins that each hold the longest item left and what fills them most beside it (subset sums, as bits)."""
    left = sorted(items, key=lambda item: -lengths[item])
    bins = []
    while left:
        first, *rest = left
        room = capacity - lengths[first]
        mask = (1 << (room + 1)) - 1
        reach = [1]  # reach[i] has bit s set where some of the first i of `rest` sum to s
        for item in rest:
            reach.append((reach[-1] | reach[-1] << lengths[item]) & mask)
        total = reach[-1].bit_length() - 1
        found, left = [first], []
        for i in range(len(rest) - 1, -1, -1):
            if reach[i] >> total & 1:  # reached without this item: rather with longer ones, which are harder to place
                left.append(rest[i])
            else:
                found.append(rest[i])
                total -= lengths[rest[i]]
        left.reverse()
        bins.append(found)
    return bins

"""Deterministic bin packing of whole groups by length.

Best-fit decreasing is within one percent of the optimum if many items fit into a bin. If only two or three fit, as with
groups in ten languages, it wastes two to four percent. A search over a few bins at a time recovers most of that loss.
"""

import random
from collections.abc import Sequence

NEAR_OPTIMUM = 1.005  # the search ends if the number of bins is at most this factor above the lower bound
PASSES = 12  # largest number of passes of the search
MIN_TRIALS = 1000  # a pass has as many trials as there are bins, but at least this number
PATIENCE = 3  # the search ends after this number of passes without an improvement

Bins = list[list[int]]


def pack_bins(lengths: Sequence[int], capacity: int, counts: Sequence[int] = (), limit: int = 0) -> Bins:
    """Pack items into as few bins as possible.

    Args:
        lengths: Number of tokens in each item, at most `capacity`.
        capacity: Maximum number of tokens in a bin.
        counts: Number of sequences in each item. Ignored if `limit` is 0.
        limit: Maximum number of sequences in a bin, 0 for no limit.

    Returns:
        The indices of the items in each bin.

    Raises:
        ValueError: An item does not fit a bin.
    """
    bins = best_fit_decreasing(lengths, capacity, counts, limit)
    # `improve` does not take the number of sequences into account.
    return bins if limit else improve(bins, lengths, capacity)


def best_fit_decreasing(lengths: Sequence[int], capacity: int, counts: Sequence[int] = (), limit: int = 0) -> Bins:
    """Put each item, longest first, into the fullest bin that has room for it. For the arguments see `pack_bins`.

    The sort is stable, so the input order only matters among items of equal length.
    """
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    bins: Bins = []
    sequences: list[int] = []  # sequences in each bin
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by free tokens, a stack each
    rooms = 0  # bit r is set if by_room[r] is not empty: the lowest bit at or above a length is the best fit
    for item in order:
        length, count = lengths[item], counts[item] if limit else 0
        if not 0 < length <= capacity or count > limit:
            raise ValueError(f"item {item} of {length} tokens, {count} sequences does not fit a bin")
        room, index = _find_best_fit(by_room, rooms, length, sequences, limit - count)
        if room < 0:
            index, room = len(bins), capacity
            bins.append([])
            sequences.append(0)
        else:
            by_room[room].remove(index)
            if not by_room[room]:
                rooms &= ~(1 << room)
        bins[index].append(item)
        sequences[index] += count
        if room > length and (not limit or sequences[index] < limit):
            by_room[room - length].append(index)
            rooms |= 1 << (room - length)
    return bins


def _find_best_fit(
    by_room: list[list[int]], rooms: int, length: int, sequences: list[int], max_sequences: int
) -> tuple[int, int]:
    """Find the fullest bin that has room for `length` tokens and holds at most `max_sequences` sequences.

    Returns:
        Its number of free tokens and its index, or (-1, -1).
    """
    candidates = rooms >> length << length
    while candidates:
        room = (candidates & -candidates).bit_length() - 1
        for index in reversed(by_room[room]):
            if sequences[index] <= max_sequences:
                return room, index
        candidates &= candidates - 1
    return -1, -1


def improve(bins: Bins, lengths: Sequence[int], capacity: int) -> Bins:
    """Repack a few bins at a time until their number is near the lower bound or no longer decreases.

    A trial takes one of the emptier bins and a few random ones, and repacks their items so that each bin is as full as
    possible. The new bins replace the old ones if there are fewer of them, or if there are as many and their token
    counts are at least as uneven.

    Args:
        bins: The bins to start from, changed in place.
        lengths: Number of tokens in each item.
        capacity: Maximum number of tokens in a bin.

    Returns:
        `bins`.
    """
    rng = random.Random(0)
    bound = max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))
    tokens = [sum(lengths[item] for item in items) for items in bins]
    idle_passes = 0
    for _ in range(PASSES):
        before = len(bins)
        for _ in range(max(before, MIN_TRIALS)):
            if len(bins) <= NEAR_OPTIMUM * bound or len(bins) < 3:
                return bins
            emptiest = min((rng.randrange(len(bins)) for _ in range(32)), key=tokens.__getitem__)
            chosen = {emptiest, *(rng.randrange(len(bins)) for _ in range(rng.randint(2, 6)))}
            old = sorted(chosen, reverse=True)
            new = _fill_one_by_one([item for index in old for item in bins[index]], lengths, capacity)
            new_tokens = [sum(lengths[item] for item in items) for items in new]
            gain = sum(number**2 for number in new_tokens) - sum(tokens[index] ** 2 for index in old)
            if len(new) < len(old) or (len(new) == len(old) and gain >= 0):
                for index in old:  # in descending order, so that the last bin can move to the index of each
                    bins[index], tokens[index] = bins[-1], tokens[-1]
                    bins.pop()
                    tokens.pop()
                bins += new
                tokens += new_tokens
        idle_passes = idle_passes + 1 if len(bins) == before else 0
        if idle_passes == PATIENCE:
            break
    return bins


def _fill_one_by_one(items: list[int], lengths: Sequence[int], capacity: int) -> Bins:
    """Fill each bin with the longest remaining item and the subset of the others that leaves least space free.

    Subset sums are stored as bit masks.
    """
    remaining = sorted(items, key=lambda item: -lengths[item])
    bins = []
    while remaining:
        first, *rest = remaining
        room = capacity - lengths[first]
        mask = (1 << (room + 1)) - 1
        sums = [1]  # bit t of sums[i] is set if some of the first i items of `rest` have t tokens in total
        for item in rest:
            sums.append((sums[-1] | sums[-1] << lengths[item]) & mask)
        total = sums[-1].bit_length() - 1
        chosen, remaining = [first], []
        # Shortest first: leave an item out if longer ones alone reach the total. Long items are harder to place later.
        for i in range(len(rest) - 1, -1, -1):
            if sums[i] >> total & 1:
                remaining.append(rest[i])
            else:
                chosen.append(rest[i])
                total -= lengths[rest[i]]
        remaining.reverse()
        bins.append(chosen)
    return bins

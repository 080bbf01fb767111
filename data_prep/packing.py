"""Best-fit-decreasing bin packing of whole groups: lengths in, bins out, the same for the same lengths."""

from collections.abc import Sequence


def best_fit_decreasing(
    lengths: Sequence[int], capacity: int, counts: Sequence[int] = (), limit: int = 0
) -> list[list[int]]:
    """Pack items into bins; each item goes to the fullest bin that still holds it, longest item first.

    lengths: tokens of each item, each at most `capacity`. counts: sequences of each item, at most `limit` a bin where
    `limit` is not 0. Returns bins as lists of item numbers, in the order in which the bins were opened.
    Equal lengths keep their order, so the result depends on the order of items only among equals.
    """
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    bins: list[list[int]] = []
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

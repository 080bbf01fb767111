"""Properties of bin packing over random lengths."""

import random

from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing.bin_packing import best_fit_decreasing, improve, pack_bins

LENGTHS = st.lists(st.integers(1, 64), max_size=60)


def token_counts(bins: list[list[int]], lengths: list[int]) -> list[int]:
    return sorted(sum(lengths[i] for i in items) for items in bins)


@given(LENGTHS)
def test_pack_bins_keeps_items_and_capacity(lengths):
    for bins in (best_fit_decreasing(lengths, 64), pack_bins(lengths, 64)):
        assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in items) <= 64 for items in bins)


@given(LENGTHS)
def test_best_fit_decreasing_matches_naive_implementation(lengths):
    expected: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [64 - sum(lengths[i] for i in items) - lengths[item] for items in expected]
        fitting = [room for room in rooms if room >= 0]
        if fitting:
            expected[rooms.index(min(fitting))].append(item)
        else:
            expected.append([item])
    actual = best_fit_decreasing(lengths, 64)
    # Any of several equally full bins may be chosen, which does not change the token counts.
    assert token_counts(actual, lengths) == token_counts(expected, lengths)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 3)), max_size=60))
def test_pack_bins_respects_sequence_limit(pairs):
    lengths, counts = [length for length, _ in pairs], [count for _, count in pairs]
    bins = pack_bins(lengths, 64, counts, limit=4)
    assert sorted(item for items in bins for item in items) == list(range(len(pairs)))
    assert all(sum(lengths[i] for i in items) <= 64 and sum(counts[i] for i in items) <= 4 for items in bins)


@given(LENGTHS)
def test_improve_never_adds_bins_and_is_reproducible(lengths):
    first = best_fit_decreasing(lengths, 64)
    improved = improve([list(items) for items in first], lengths, 64)
    assert len(improved) <= len(first)
    assert improved == improve([list(items) for items in first], lengths, 64)


def test_pack_bins_saves_bins_if_best_fit_is_poor():
    rng = random.Random(0)
    lengths = [rng.randint(500, 1200) for _ in range(600)]
    bound = max(-(-sum(lengths) // 2048), sum(length > 1024 for length in lengths))
    assert len(best_fit_decreasing(lengths, 2048)) > 1.02 * bound
    assert len(pack_bins(lengths, 2048)) < 0.99 * len(best_fit_decreasing(lengths, 2048))

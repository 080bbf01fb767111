import random

from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing.bin_packing import best_fit_decreasing, improve, pack_bins

LENGTHS = st.lists(st.integers(1, 64), max_size=60)


@given(LENGTHS)
def test_every_item_once_and_no_bin_over_capacity(lengths):
    for bins in (best_fit_decreasing(lengths, 64), pack_bins(lengths, 64)):
        assert sorted(item for found in bins for item in found) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in found) <= 64 for found in bins)


@given(LENGTHS)
def test_does_what_the_slow_obvious_form_does(lengths):
    expected: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [64 - sum(lengths[i] for i in found) - lengths[item] for found in expected]
        fitting = [room for room in rooms if room >= 0]
        if fitting:
            expected[rooms.index(min(fitting))].append(item)
        else:
            expected.append([item])
    found = best_fit_decreasing(lengths, 64)
    # Among equally full bins the choice is free, and it changes no bin's fill.
    assert sorted(sum(lengths[i] for i in one) for one in found) == sorted(
        sum(lengths[i] for i in one) for one in expected
    )


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 3)), max_size=60))
def test_no_bin_holds_more_sequences_than_the_limit(items):
    lengths, counts = [length for length, _ in items], [count for _, count in items]
    bins = pack_bins(lengths, 64, counts, limit=4)
    assert sorted(item for found in bins for item in found) == list(range(len(items)))
    assert all(sum(lengths[i] for i in found) <= 64 and sum(counts[i] for i in found) <= 4 for found in bins)


@given(LENGTHS)
def test_the_search_only_ever_saves_bins_and_gives_the_same_again(lengths):
    first = best_fit_decreasing(lengths, 64)
    found = improve([list(one) for one in first], lengths, 64)
    assert len(found) <= len(first)
    assert found == improve([list(one) for one in first], lengths, 64)


def test_the_search_saves_bins_where_best_fit_is_far_from_the_optimum():
    rng = random.Random(0)
    lengths = [rng.randint(500, 1200) for _ in range(600)]
    bound = max(-(-sum(lengths) // 2048), sum(length > 1024 for length in lengths))
    assert len(best_fit_decreasing(lengths, 2048)) > 1.02 * bound
    assert len(pack_bins(lengths, 2048)) < 0.99 * len(best_fit_decreasing(lengths, 2048))

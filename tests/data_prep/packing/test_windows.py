"""Properties of the rows of a packing window over random groups."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing.windows import NO_TRANSLATION, TOO_LONG, TRUNCATED, Limits, Window

LANGS = ["de", "en", "sw", "th", "zh"]  # sorted, as in a window, with the pivot in the middle
GROUPS = st.lists(st.dictionaries(st.sampled_from(LANGS), st.integers(2, 80), min_size=1), min_size=1, max_size=25)
LIMITS = st.builds(
    Limits,
    tokens=st.integers(40, 120),
    sequences=st.sampled_from([0, 0, 1, 2, 3]),
    truncate=st.booleans(),
    translations=st.sampled_from([0, 0, 1, 2]),
    pairs_only=st.booleans(),
)


def window(groups: list[dict[str, int]]) -> Window:
    """Build a window of groups {language: length} with a pivot each. The second half of a sequence is supervised."""
    groups = [{"en": 10, **group} for group in groups]
    members = [(f"p{number:02d}", lang, group[lang]) for number, group in enumerate(groups) for lang in sorted(group)]
    pair_id, lang, length = zip(*members, strict=True)
    lengths = np.array(length, np.int64)
    columns = {
        "key": np.array([int(name[1:]) for name in pair_id], np.uint64),
        "pair_id": pair_id,
        "lang": lang,
        "place": np.arange(len(members)),
        "offset": np.cumsum(lengths) - lengths,
        "length": lengths.astype(np.int32),
        "supervised": (lengths // 2).astype(np.int32),
        "characters": lengths,
        "gold": [None] * len(members),
        "piece": np.zeros(len(members), np.int32),
    }
    full_length = dict(zip(columns["offset"].tolist(), length, strict=True))

    def count_supervised(split: int, offset: int, number: int) -> int:
        return count_in_second_half(full_length[offset], number)

    return Window(pa.table(columns), "en", lambda split, position: f"row {position}", count_supervised)


def count_in_second_half(length: int, number: int) -> int:
    """Return how many of the first `number` tokens are in the second half of a sequence."""
    return max(0, number - (length - length // 2))


@given(GROUPS, LIMITS)
@settings(max_examples=150)
def test_window_rows_contain_all_that_fits(groups, limits):
    packing_window = window(groups)
    whole = packing_window.groups()
    pair_id, lang, length = (packing_window.table[name].to_pylist() for name in ("pair_id", "lang", "length"))
    before = {(pair_id[i], lang[i]): length[i] for group in whole for i in group}
    subgroups = [subgroup for group in whole for subgroup in packing_window.fit(group, limits)]
    table = packing_window.rows(subgroups, limits, "seed")
    rows: dict[int, list[dict]] = {}
    for member in table.to_pylist():
        rows.setdefault(member["row"], []).append(member)

    packed = Counter((member["pair_id"], member["lang"]) for row in rows.values() for member in row)
    dropped: Counter = Counter()
    for (lang_, reason), number in packing_window.drops.items():
        dropped[lang_] += number * (reason in (TOO_LONG, NO_TRANSLATION))
    missing = Counter(lang for _, lang in before.keys() - packed.keys())
    assert missing == dropped  # every sequence is packed or counted as dropped
    assert all(number == 1 or lang == "en" for (_, lang), number in packed.items())  # pivots alone may repeat
    for row in rows.values():
        assert all(member["copies"] == packed[member["pair_id"], member["lang"]] for member in row)
    if not limits.truncate:
        assert not any(reason == TRUNCATED for _, reason in packing_window.drops)

    for row in rows.values():
        assert sum(member["length"] for member in row) <= limits.tokens
        assert not limits.sequences or len(row) <= limits.sequences
        for member in row:
            assert count_in_second_half(before[member["pair_id"], member["lang"]], member["length"]) >= 1
        current = None
        translations = Counter(member["pair_id"] for member in row if member["lang"] != "en")
        assert not limits.translations or max(translations.values(), default=0) <= limits.translations
        assert not limits.pairs_only or translations.keys() == {member["pair_id"] for member in row}
        for member in row:  # groups are contiguous and start with their pivot
            if member["lang"] == "en":
                current = member["pair_id"]
            assert member["pair_id"] == current


@given(GROUPS)
def test_window_fit_keeps_short_groups_whole(groups):
    packing_window = window(groups)
    limits = Limits(tokens=400)
    whole = packing_window.groups()
    assert [packing_window.fit(group, limits) for group in whole] == [[group] for group in whole]
    assert not packing_window.drops

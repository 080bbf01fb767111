"""Properties of what becomes of the groups of a window, over random groups."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing.windows import TOO_LONG, TRUNCATED, Limits, Window

LANGS = ["de", "en", "sw", "th", "zh"]  # sorted, as windows are; the pivot in the middle
GROUPS = st.lists(st.dictionaries(st.sampled_from(LANGS), st.integers(2, 80), min_size=1), min_size=1, max_size=25)
LIMITS = st.builds(
    Limits, tokens=st.integers(40, 120), sequences=st.sampled_from([0, 0, 1, 2, 3]), truncate=st.booleans()
)


def window(groups: list[dict[str, int]]) -> Window:
    """A window of groups {language: length}, each given a pivot; the second half of a sequence is supervised."""
    groups = [{"en": 10, **group} for group in groups]
    members = [(f"p{number:02d}", lang, group[lang]) for number, group in enumerate(groups) for lang in sorted(group)]
    pair_id, lang, length = zip(*members, strict=True)
    lengths = np.array(length, np.int64)
    columns = {
        "key": np.array([int(one[1:]) for one in pair_id], np.uint64),
        "pair_id": pair_id,
        "lang": lang,
        "place": np.arange(len(members)),
        "offset": np.cumsum(lengths) - lengths,
        "length": lengths.astype(np.int32),
        "supervised": (lengths // 2).astype(np.int32),
        "characters": lengths,
        "piece": np.zeros(len(members), np.int32),
    }
    by_offset = dict(zip(columns["offset"].tolist(), length, strict=True))

    def supervised_within(piece: int, offset: int, number: int) -> int:
        full = by_offset[offset]
        return max(0, number - (full - full // 2))

    return Window(pa.table(columns), "en", lambda piece, place: f"row {place}", supervised_within)


@given(GROUPS, LIMITS)
@settings(max_examples=300)
def test_nothing_is_lost_doubled_split_or_over_the_limits(groups, limits):
    found = window(groups)
    whole = found.groups()
    before = {(found.table["pair_id"][i].as_py(), found.table["lang"][i].as_py()) for group in whole for i in group}
    units = [unit for group in whole for unit in found.fit(group, limits)]
    table = found.rows(units, limits, "seed")
    rows: dict[int, list[dict]] = {}
    for member in table.to_pylist():
        rows.setdefault(member["row"], []).append(member)

    packed = Counter((member["pair_id"], member["lang"]) for row in rows.values() for member in row)
    dropped = Counter({lang: number for (lang, reason), number in found.drops.items() if reason == TOO_LONG})
    missing = Counter(lang for _, lang in before - packed.keys())
    assert missing == dropped  # what is not packed is counted, by its language
    assert all(number == 1 or lang == "en" for (_, lang), number in packed.items())  # pivots alone may repeat
    if not limits.truncate:
        assert not any(reason == TRUNCATED for _, reason in found.drops)

    for row in rows.values():
        assert sum(member["length"] for member in row) <= limits.tokens
        assert not limits.sequences or len(row) <= limits.sequences
        for member in row:
            assert found._supervised_within(0, member["offset"], member["length"]) >= 1
        current = None
        for member in row:  # groups contiguous, each from its pivot on
            if member["lang"] == "en":
                current = member["pair_id"]
            assert member["pair_id"] == current


@given(GROUPS)
def test_groups_that_fit_stay_whole(groups):
    found = window(groups)
    limits = Limits(tokens=400)
    whole = found.groups()
    assert [found.fit(group, limits) for group in whole] == [[group] for group in whole]
    assert not found.drops

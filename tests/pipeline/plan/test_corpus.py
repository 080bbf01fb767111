"""Estimated time of preprocessing."""

import pytest

from pipeline.plan.corpus import PackingRun


def test_large_packing_run_scales_with_ranks() -> None:
    one, many = PackingRun(1e9, 1), PackingRun(1e9, 1000)
    assert one.splits == many.splits and one.seconds / many.seconds == pytest.approx(1000, rel=0.05)


def test_small_packing_run_has_too_few_pieces_for_many_ranks() -> None:
    assert PackingRun(1e6, 1000).seconds == pytest.approx(PackingRun(1e6, 64).seconds, rel=0.1)

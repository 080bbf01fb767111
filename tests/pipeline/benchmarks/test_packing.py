"""The packing benchmark."""

import argparse
from pathlib import Path

import pytest

from pipeline.benchmarks.packing import DATA_PREP, next_fit, packing_efficiencies, run_variant


def test_packing_efficiency_lies_between_next_fit_and_bound(demo_file: Path, tokenizer_dir: Path) -> None:
    args = argparse.Namespace(input=demo_file, tokenizer=str(tokenizer_dir), max_seq_length=2048)
    groups, singles = packing_efficiencies(args)
    assert groups["fill_of"] == "groups" and singles["mean_length"] < groups["mean_length"]
    for row in (groups, singles):
        assert row["next_fit"] <= row["best_fit_decreasing"] <= row["ours"] <= row["bound"] <= 1


def test_next_fit_fills_last_bin_only() -> None:
    assert next_fit([6, 5, 4, 6], 10) == 3


@pytest.mark.slow
def test_variant_runs_in_own_process(demo_file: Path, tokenizer_dir: Path) -> None:
    args = argparse.Namespace(input=demo_file, tokenizer=str(tokenizer_dir), max_seq_length=1024)
    result = run_variant(args, DATA_PREP)
    assert result["tokens"] > 1000 and result["seconds"] > 0 and result["cpu_seconds"] > 0

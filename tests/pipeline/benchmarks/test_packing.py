import argparse

import pytest

from pipeline.benchmarks.packing import OURS, _next_fit, fills, machine, run_contender


def test_fill_rows_lie_between_next_fit_and_the_bound(demo_file, tokenizer_dir):
    args = argparse.Namespace(input=demo_file, tokenizer=str(tokenizer_dir), max_seq_length=2048)
    groups, singles = fills(args)
    assert groups["fill_of"] == "groups" and singles["mean_length"] < groups["mean_length"]
    for row in (groups, singles):
        assert row["next_fit"] <= row["best_fit_decreasing"] <= row["ours"] <= row["bound"] <= 1


def test_next_fit_looks_at_the_last_bin_only():
    assert _next_fit([6, 5, 4, 6], 10) == 3


def test_machine_names_versions():
    assert "tokenizers " in machine() and "cores" in machine()


@pytest.mark.slow
def test_a_contender_runs_by_itself(demo_file, tokenizer_dir):
    args = argparse.Namespace(input=demo_file, tokenizer=str(tokenizer_dir), max_seq_length=1024)
    result = run_contender(args, OURS)
    assert result["tokens"] > 1000 and result["seconds"] > 0 and result["cpu_seconds"] > 0

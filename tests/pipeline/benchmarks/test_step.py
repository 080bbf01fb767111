"""The benchmark of whole training steps."""

import pytest

from pipeline.benchmarks.step_variants import MODULES, ONE_BY_ONE, PLAIN
from tests.runs import run_forked_ranks


@pytest.mark.slow
@pytest.mark.parametrize("variant", [MODULES, ONE_BY_ONE, PLAIN])
def test_step_benchmark_runs_variant(variant: str) -> None:
    sizes = ["--vocab_size=512", "--hidden_size=64", "--layers=1", "--tokens=64", "--sequence=16", "--steps=2"]
    (measurements,) = run_forked_ranks(2, ["-m", "pipeline.benchmarks.step", f"--arm={variant}", "--ranks=2", *sizes])
    assert len(measurements["times"]) == 2 and min(measurements["times"]) > 0

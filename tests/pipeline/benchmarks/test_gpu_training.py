"""The comparison of two ranks with one that the GPU benchmark makes, here on CPUs."""

from pathlib import Path

import pytest

from pipeline.benchmarks import gpu_training
from pipeline.benchmarks.gpu_training import compare_ranks
from tests.conftest import Prepared
from tests.runs import write_recipe


@pytest.mark.slow
def test_compare_ranks_passes_on_cpus(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that is killed after its second step has ten more to go."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared.shards, prepared.tokenizer, training__max_steps=12)
    monkeypatch.setattr(gpu_training, "_prepare", lambda folder: recipe)
    results = list(compare_ranks(on_cpu=True))
    assert [status for status, _ in results] == ["passed"] * 3, results
    texts = ["two ranks, head vocab_parallel: losses", "two ranks, head gathered: losses", "two ranks, one killed"]
    assert all(text.startswith(start) for (_, text), start in zip(results, texts, strict=True)), results

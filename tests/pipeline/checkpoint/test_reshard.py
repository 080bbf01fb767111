"""A run resumes on another number of ranks with the same rows in the same order and the same losses."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Prepared
from tests.runs import metrics, train, write_recipe

pytestmark = pytest.mark.slow

SETTINGS = {
    "training__train_batch_size": 12,
    "training__max_steps": 6,
    "training__save_steps": 1,
    "training__save_total_limit": 10,
    "training__embedding_learning_rate": 0.0005,
}


def keep_up_to(directory: Path, step: int) -> None:
    """Delete later checkpoints, as if the run had been killed after saving checkpoint-`step`."""
    for path in directory.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


def comparable_metrics(directory: Path) -> list[dict[str, float]]:
    """Metrics that do not depend on time or on the number of ranks."""
    dropped = ("tokens_per_second", "mfu", "peak_memory_gb", "save_seconds", "step_seconds")
    return [{k: v for k, v in record.items() if k not in dropped} for record in metrics(directory)]


def assert_same(directory: Path, uninterrupted: Path) -> None:
    actual, expected = comparable_metrics(directory), comparable_metrics(uninterrupted)
    assert len(actual) == len(expected) == SETTINGS["training__max_steps"]
    for record, reference in zip(actual, expected, strict=True):
        assert record["num_tokens"] == reference["num_tokens"]
        for key in reference:
            bound = 1e-6 if key == "loss" or key.startswith("ce_loss") else 1e-4
            # align_loss is 1 - cosine, so near 0 it has the rounding error of the 1.
            assert record[key] == pytest.approx(reference[key], rel=bound, abs=1e-7), (record["step"], key)


@pytest.fixture(scope="module")
def uninterrupted(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "whole.yaml"
    recipe = write_recipe(path, prepared.shards, prepared.tokenizer, **SETTINGS)
    train(2, "--config", recipe)
    return recipe.with_suffix("")


def test_resume_on_other_numbers_of_ranks(prepared: Prepared, uninterrupted: Path, tmp_path: Path) -> None:
    """One run on 2, 1, 2, 4 and 3 ranks in turn; the start on one rank offloads its optimizer to CPU memory."""
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **SETTINGS)
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for saved_ranks, ranks, step, extra in [
        (2, 1, 1, ["--deepspeed", "ds_configs/zero3_offload.json"]),
        (1, 2, 2, []),
        (2, 4, 3, []),
        (4, 3, 4, []),
    ]:
        keep_up_to(run, step)
        output = train(ranks, "--config", recipe, *extra)
        assert f"resumed from {run}/checkpoint-{step}, saved by {saved_ranks} ranks" in output
        assert_same(run, uninterrupted)
        assert (run / f".checkpoint-{step}.universal").is_dir()
        assert not list(run.glob(".*.partial"))


def test_resume_bf16_keeps_fp32_weights(prepared: Prepared, tmp_path: Path) -> None:
    """Gradients are summed over ranks in bf16, so later losses agree only within its rounding error."""
    changes = {**SETTINGS, "training__max_steps": 4, "training__precision": "bf16", "loss__centring": True}
    whole = write_recipe(tmp_path / "whole.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", whole)
    before = metrics(tmp_path / "whole")
    keep_up_to(tmp_path / "whole", 2)
    train(1, "--config", whole)
    after = metrics(tmp_path / "whole")
    assert after[2]["ce_loss"] == pytest.approx(before[2]["ce_loss"], rel=1e-6)  # the same weights
    assert after[3]["ce_loss"] == pytest.approx(before[3]["ce_loss"], rel=1e-3)

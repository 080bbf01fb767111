"""A run goes on with another number of ranks: same rows in the same order, same losses."""

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
}


def keep_up_to(directory: Path, step: int) -> None:
    """As if the run had been killed after saving checkpoint-`step`."""
    for path in directory.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


def figures(directory: Path) -> list[dict[str, float]]:
    """What does not depend on time or on the number of ranks."""
    own = ("tokens_per_second", "mfu", "peak_memory_gb", "save_seconds", "step_seconds")
    return [{k: v for k, v in record.items() if k not in own} for record in metrics(directory)]


def assert_same(directory: Path, undisturbed: Path) -> None:
    got, expected = figures(directory), figures(undisturbed)
    assert len(got) == len(expected) == SETTINGS["training__max_steps"]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["num_tokens"] == theirs["num_tokens"]
        for key in theirs:
            bound = 1e-6 if key == "loss" or key.startswith("ce_loss") else 1e-4
            # align_loss is 1 - cosine: near 0, rounding of the 1.
            assert mine[key] == pytest.approx(theirs[key], rel=bound, abs=1e-7), (mine["step"], key)


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "whole.yaml"
    recipe = write_recipe(path, prepared.shards, prepared.tokenizer, **SETTINGS)
    train(2, "--config", recipe)
    return recipe.with_suffix("")


def test_one_run_on_two_one_two_four_and_three_ranks(prepared: Prepared, undisturbed: Path, tmp_path: Path) -> None:
    """Each change of ranks is one start; the run on one rank has its optimizer in CPU memory."""
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **SETTINGS)
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for saved, ranks, done, extra in [
        (2, 1, 1, ["--deepspeed", "ds_configs/zero3_offload.json"]),
        (1, 2, 2, []),
        (2, 4, 3, []),
        (4, 3, 4, []),
    ]:
        keep_up_to(run, done)
        output = train(ranks, "--config", recipe, *extra)
        assert f"resumed from {run}/checkpoint-{done}, saved by {saved} ranks" in output
        assert_same(run, undisturbed)
        assert (run / f".checkpoint-{done}.universal").is_dir()
        assert not list(run.glob(".*.partial"))


def test_bf16_keeps_its_fp32_weights(prepared: Prepared, tmp_path: Path) -> None:
    """Gradients are summed over ranks in bf16, so later losses agree only to its rounding."""
    changes = {**SETTINGS, "training__max_steps": 4, "training__precision": "bf16", "loss__centring": True}
    whole = write_recipe(tmp_path / "whole.yaml", prepared.shards, prepared.tokenizer, **changes)
    train(2, "--config", whole)
    before = metrics(tmp_path / "whole")
    keep_up_to(tmp_path / "whole", 2)
    train(1, "--config", whole)
    after = metrics(tmp_path / "whole")
    assert after[2]["ce_loss"] == pytest.approx(before[2]["ce_loss"], rel=1e-6)  # the same weights
    assert after[3]["ce_loss"] == pytest.approx(before[3]["ce_loss"], rel=1e-3)

"""Checks of a recipe against its data, model and ranks."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from data_prep.shards.format import ShardSet
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import AgreedError, UserError
from pipeline.config.recipe import load_config
from pipeline.data.loader import BatchSplit
from pipeline.training.preflight import prepare_run
from pipeline.training.rank_checks import check_process_group
from tests.conftest import Prepared
from tests.runs import TINY, select_rows, write_recipe


def test_check_process_group_refuses_other_rank() -> None:
    check_process_group(BatchSplit(8, 1, rank=0, world_size=1))
    with pytest.raises(AgreedError, match="rank 0 of 1 reads data as rank 1 of 2"):
        check_process_group(BatchSplit(8, 1, rank=1, world_size=2))


@pytest.mark.parametrize("is_used", [False, True])
def test_model_may_lack_tokens_that_the_data_do_not_use(prepared: Prepared, tmp_path: Path, is_used: bool) -> None:
    """The tokenizer of Gemma 3 1B has a token more than the model."""
    shards = select_rows(prepared.shards, tmp_path / "shards", slice(1))
    largest = max(int(row.input_ids.max()) for row in ShardSet.open(shards))
    size = largest + (0 if is_used else 1)
    AutoConfig.for_model(**TINY, vocab_size=size).save_pretrained(tmp_path / "base")
    recipe = write_recipe(
        tmp_path / "run.yaml",
        shards,
        prepared.tokenizer,
        model={"path": str(tmp_path / "base")},
        data__eval_shards=str(shards),
    )
    config = load_config(recipe, [])
    if not is_used:
        assert prepare_run(config, 0, 1).vocab_size == size < len(load_tokenizer(prepared.tokenizer))
        return
    with pytest.raises(UserError, match=f"uses the token id {largest}, but the model's vocab_size is {size}; use"):
        prepare_run(config, 0, 1)

"""A tiny model and the settings of a small study."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.study.settings import StudySettings
from tests.conftest import Prepared
from tests.runs import TINY, write_recipe


@pytest.fixture
def study(prepared: Prepared, tmp_path: Path) -> StudySettings:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY, vocab_size=600)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    load_tokenizer(prepared.tokenizer).save_pretrained(tmp_path / "model")
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        prepared.shards,
        None,
        model={"path": str(tmp_path / "model"), "vocab_multiple": 8},
        training__max_steps=6,
        training__export_at_end=True,
    )
    assert yaml.safe_load(recipe.read_text())["seed"] == 3
    return StudySettings(
        output=str(tmp_path / "study"),
        model=str(tmp_path / "model"),
        recipe=str(recipe),
        train=(str(prepared.data),),
        test=str(prepared.test),
        dev=None,
        answers=None,
        variants=("sft", "shuffled_pairs"),
        seeds=(1, 2),
        primary=("mean",),
        prepare_args="--max_seq_length 512",
        evaluate_args="--limit 2 --max_new_tokens 4",
    )

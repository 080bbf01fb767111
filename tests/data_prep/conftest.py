"""Session fixtures: small demo data and a tokenizer trained on it."""

from pathlib import Path

import pytest
from hypothesis import settings

from data_prep.demo.problems import write_demo
from data_prep.tokenization.sampling import sample_texts
from data_prep.tokenization.sentencepiece_models import train_tokenizer
from data_prep.tokenization.tokenizer import save_tokenizer

settings.register_profile("no_deadline", deadline=None)  # a loaded machine must not fail tests
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory) -> Path:
    """Write 40 training problems in four languages, of which Swahili has only 10."""
    folder = tmp_path_factory.mktemp("demo")
    languages = ["en", "fr", "zh", "sw"]
    write_demo(folder / "train.jsonl", folder / "test.jsonl", languages, ["sw"], 40, 10, 5, seed=0)
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def tokenizer_dir(demo_file, tmp_path_factory) -> Path:
    """Train a tokenizer of 512 tokens on the demo data."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    save_tokenizer(train_tokenizer(sample_texts([demo_file], 0.5, 1_000_000), 512), folder)
    return folder

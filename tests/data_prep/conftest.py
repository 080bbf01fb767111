"""Small demo data and a tokenizer trained on it, made once."""

from pathlib import Path

import pytest
from hypothesis import settings

from data_prep.demo.problems import write_demo
from data_prep.tokenization.sampling import sample_texts
from data_prep.tokenization.tokenizer import save, train

settings.register_profile("busy machines too", deadline=None)
settings.load_profile("busy machines too")


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory) -> Path:
    """40 training problems in four languages, 10 of them in Swahili; the test problems beside it."""
    folder = tmp_path_factory.mktemp("demo")
    languages = ["en", "fr", "zh", "sw"]
    write_demo(folder / "train.jsonl", folder / "test.jsonl", languages, ["sw"], 40, 10, 5)
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def tokenizer_dir(demo_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    save(train(sample_texts([demo_file], 0.5, 1_000_000), 512), folder)
    return folder

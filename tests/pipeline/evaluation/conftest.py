"""The tiny model and its tokenizer, made once."""

import pytest

from tests.pipeline.evaluation.tiny_model import make_model, make_records, make_tokenizer, save


@pytest.fixture(scope="package")
def tokenizer():
    return make_tokenizer([r["question"] + r["answer"] for r in make_records()])


@pytest.fixture(scope="package")
def random_model_dir(tokenizer, tmp_path_factory):
    model = make_model(tokenizer)
    model.generation_config.do_sample = True  # as in many published models: evaluation must remain greedy
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 1.8
    return save(model, tokenizer, tmp_path_factory.mktemp("random"))

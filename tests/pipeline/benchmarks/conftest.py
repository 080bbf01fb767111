"""Fixtures of the benchmark tests."""

from tests.data_prep.conftest import demo_file, tokenizer_dir

__all__ = ["demo_file", "tokenizer_dir"]

"""Collect the tokens that end a response."""

from typing import Any


def stop_token_ids(own: int | list[int] | None, tokenizer: Any) -> list[int] | None:
    """The tokens that end a response: the model's own, and the tokenizer's, which a template may end turns with."""
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}) or None

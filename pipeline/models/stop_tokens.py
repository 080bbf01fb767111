"""Stop tokens of a model and its chat template."""

from typing import Any


def stop_token_ids(model_eos: int | list[int] | None, tokenizer: Any) -> list[int] | None:
    """Return the ids of all tokens that end a response, sorted, or None if there are none.

    They are the model's own `eos_token_id` and the tokenizer's, which a chat template may end turns with.
    """
    own = model_eos if isinstance(model_eos, list) else [model_eos]
    return sorted({tokenizer.eos_token_id, *own} - {None}) or None

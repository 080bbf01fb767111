"""Stop tokens of a model and its chat template."""

from typing import Any


def stop_token_ids(model_eos: int | list[int] | None, tokenizer: Any) -> list[int] | None:
    """Return the ids of all tokens that end a response, sorted, or None if there are none.

    They are the `eos_token_id` of the model and that of the tokenizer, which a chat template may use to end turns.
    """
    own = model_eos if isinstance(model_eos, list) else [model_eos]
    return sorted({tokenizer.eos_token_id, *own} - {None}) or None

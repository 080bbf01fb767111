"""Settings of an evaluation."""

import dataclasses
from typing import Literal

from jsonargparse.typing import PositiveInt


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate, and how.

    Args:
        model: directory of a Hugging Face causal LM with its tokenizer and chat template.
        data: JSON Lines of records {pair_id, lang, messages or question, gold}; gold is the final number.
        output: directory of the three result files; by default the model's directory.
        pivot: language that the answers in the other languages are compared with.
        batch_size: number of sequences that each rank generates at once.
        max_new_tokens: maximum length of a response, in tokens.
        limit: evaluate only this many questions, the first ones, each in all its languages.
        dtype: data type of the model; auto takes the one of the model's files.
    """

    model: str
    data: str
    output: str | None = None
    pivot: str = "en"
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 512
    limit: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

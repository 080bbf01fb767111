"""The settings of an evaluation."""

import dataclasses
from typing import Literal

from jsonargparse.typing import PositiveInt


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate and how.

    Args:
        model: directory of a Hugging Face causal LM with its tokenizer and chat template.
        data: JSON Lines of records {pair_id, lang, messages or question, gold}; gold is the final number.
        output: where the three result files go; the model's directory if not given.
        pivot: language the others' answers are compared with.
        batch_size: sequences generated at once on each rank.
        max_new_tokens: longest answer, in tokens.
        limit: take only the first so many problems, each in all its languages.
        dtype: arithmetic; auto takes that of the model's files.
    """

    model: str
    data: str
    output: str | None = None
    pivot: str = "en"
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 512
    limit: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

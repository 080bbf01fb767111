"""Settings of an evaluation."""

import dataclasses
from typing import Any, Literal

from jsonargparse.typing import PositiveInt


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Args:
        model: directory of a Hugging Face causal LM with its tokenizer and chat template.
        data: JSON Lines or Parquet of records {pair_id, lang, messages or question, gold}; see docs/evaluation.md.
        output: directory for the three result files; default: the model directory.
        pivot: language to compare the answers in other languages with.
        batch_size: number of sequences per batch on each rank.
        max_new_tokens: maximum length of a response, in tokens.
        limit: evaluate only the first `limit` questions, each in all its languages.
        dtype: data type of the model; auto: the data type in the model files.
        chat_template_kwargs: variables of the chat template, as JSON: {"enable_thinking": false}.
        allow_stale: evaluate an export even if its run has a newer checkpoint.
    """

    model: str
    data: str
    output: str | None = None
    pivot: str = "en"
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 512
    limit: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    allow_stale: bool = False

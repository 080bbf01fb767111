"""Settings of an evaluation."""

import dataclasses
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt, restricted_number_type

from pipeline.common.errors import UserError
from pipeline.evaluation.server import check_base_url

TopP = restricted_number_type("TopP", float, [(">", 0), ("<=", 1)], docstring="Number in (0, 1].")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Args:
        model: directory of a Hugging Face causal LM with its tokenizer and chat template, or a Hub model ID; with
            `base_url`, the name of the served model.
        data: JSON Lines or Parquet of records {pair_id, lang, messages or question, gold}; see docs/evaluation.md.
        output: directory for the three result files; default: the model directory.
        base_url: URL of an OpenAI-compatible server that generates the responses, such as http://localhost:8000/v1.
            The environment variable OPENAI_API_KEY holds the API key, if one is needed.
        server_timeout: seconds to wait for a server that is down before giving up.
        pivot: language to compare the answers in other languages with.
        batch_size: number of sequences per batch on each rank, or of concurrent requests to the server.
        max_new_tokens: maximum length of a response, in tokens.
        temperature: sampling temperature; 0: greedy decoding.
        top_p: sample from the most probable tokens that have this probability together.
        num_samples: number of responses to each question.
        seed: random seed of the sampling.
        limit: evaluate only the first `limit` questions, each in all its languages.
        dtype: data type of the model; auto: the data type in the model files.
        chat_template_kwargs: variables of the chat template, as JSON: {"enable_thinking": false}.
        chat_template: file of a Jinja chat template to use instead of the tokenizer's.
        few_shot: JSON Lines or Parquet of records with answers, which precede each question as completed turns. A
            tokenizer without chat template then gets a plain one.
        num_shots: number of these records, the first ones in the language of the question.
        trust_remote_code: run code of the model's repository.
        allow_stale: evaluate an export even if its run has a newer checkpoint.
    """

    model: str
    data: str
    output: str | None = None
    base_url: str | None = None
    server_timeout: PositiveInt = 600
    pivot: str = "en"
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 512
    temperature: NonNegativeFloat = 0.0
    top_p: TopP = 1.0  # type: ignore[valid-type]
    num_samples: PositiveInt = 1
    seed: int = 0
    limit: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    few_shot: str | None = None
    num_shots: PositiveInt = 8
    trust_remote_code: bool = False
    allow_stale: bool = False


def check_settings(settings: EvaluationSettings) -> None:
    """Check the settings against each other.

    Raises:
        UserError: two of them contradict each other, or `output` is missing.
    """
    if settings.temperature == 0 and (settings.num_samples > 1 or settings.top_p < 1):
        name = "num_samples" if settings.num_samples > 1 else "top_p"
        raise UserError(f"--{name} has no effect on greedy decoding; set --temperature to a number above 0")
    if settings.few_shot is None and settings.num_shots != EvaluationSettings.num_shots:
        raise UserError("--num_shots has no effect without --few_shot; give the file of the worked examples")
    if settings.base_url is None:
        return
    check_base_url(settings.base_url)
    if settings.output is None:
        raise UserError("--base_url needs --output, the directory for the results")
    if settings.chat_template is not None:
        raise UserError("--chat_template has no effect on a server; start the server with the chat template")
    if settings.trust_remote_code:
        raise UserError("--trust_remote_code has no effect on a server; start the server with it")
    if settings.dtype != "auto":
        raise UserError("--dtype has no effect on a server; start the server with the data type")


def comparable_settings(settings: EvaluationSettings) -> dict[str, Any]:
    """Return the settings, with defaults for those that do not determine the generations.

    Of the input files, the content determines them, and not the path.
    """
    neutral: dict[str, Any] = {"output": None, "allow_stale": False, "server_timeout": 600, "pivot": "en"}
    neutral |= {"data": "", "chat_template": None, "few_shot": None}
    if settings.base_url is not None:
        neutral["batch_size"] = 16  # the number of concurrent requests
    return dataclasses.asdict(dataclasses.replace(settings, **neutral))

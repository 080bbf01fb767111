"""Prompts of an evaluation: worked examples before each question, and the chat template of a base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from data_prep.records import Record, read_records
from data_prep.tokenization.template_rendering import template_variables
from pipeline.common.errors import UserError, first_line
from pipeline.evaluation.dataset import Example

# Template of a tokenizer that has none. It ends each answer with the beginning of the next question, so that a base
# model's continuation is cut there.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n{% endif %}"
    "{% endfor %}Question:{% for message in messages %}{% if message.role == 'user' %} {{ message.content }}\nAnswer:"
    "{% elif message.role == 'assistant' %} {{ message.content }}\n\nQuestion:{% endif %}{% endfor %}"
)


def read_chat_template(path: Path) -> str:
    """Read a chat template.

    Raises:
        UserError: the file cannot be read, is not valid Jinja, or does not read the variable `messages`.
    """
    try:
        template = path.read_text("utf-8")
        variables = template_variables(template)
    except OSError as error:
        raise UserError(f"--chat_template {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, TemplateError) as error:
        raise UserError(f"--chat_template {path}: not a Jinja template ({first_line(error)})") from None
    if "messages" not in variables:
        raise UserError(
            f"--chat_template {path}: not a chat template, since it does not read `messages`; an example: "
            "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        )
    return template


def add_few_shot(examples: Sequence[Example], path: Path, num_shots: int) -> list[Example]:
    """Precede each question by the first `num_shots` records of its language, without their system messages.

    A record that asks the same question is skipped.

    Args:
        examples: the examples to evaluate.
        path: JSON Lines or Parquet of canonical records, with answers.
        num_shots: number of records before each question.

    Raises:
        UserError: the file is missing, a record is malformed, or a language has too few records.
    """
    by_language: dict[str, list[Record]] = {}
    for record in read_records([path]):
        by_language.setdefault(record.lang, []).append(record)
    result = []
    for example in examples:
        asked = _last_user_text(example.messages)
        records = [record for record in by_language.get(example.lang, []) if _last_user_text(record.messages) != asked]
        if len(records) < num_shots:
            raise UserError(
                f"--few_shot {path}: {len(records)} records in language {example.lang!r} besides the question with "
                f"pair_id {example.pair_id!r}, but --num_shots is {num_shots}; add records, or set it lower"
            )
        shots = [m for record in records[:num_shots] for m in record.messages if m["role"] != "system"]
        system = [message for message in example.messages if message["role"] == "system"]
        question = [message for message in example.messages if message["role"] != "system"]
        result.append(example._replace(messages=[*system, *shots, *question]))
    return result


def _last_user_text(messages: Sequence[dict[str, Any]]) -> str | None:
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), None)

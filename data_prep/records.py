"""Check, read and write canonical records. A record is one conversation in one language."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.readers import read_inputs
from pipeline.common.errors import UserError

_THOUSANDS = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,2}(,\d{2})+,\d{3})(\.\d+)?")
_LANG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the names that transformers accepts
ANSWER_TYPES = ("number", "expression", "choice", "text")
CHOICE_LETTERS = "ABCDEFGHIJ"
MAX_DEPTH = 100  # of nested lists and objects in messages and tools
_BLANK_LETTERS = set("\u115f\u1160\u2800\u3164\uffa0")  # fillers, which are letters or symbols to Unicode but invisible


class Record(NamedTuple):
    """A training conversation in one language. Records with the same `pair_id` are translations of the same example.

    Attributes:
        pair_id: Shared by the translations of one example.
        lang: Language code.
        messages: `role` and `content` of each message, and optionally `reasoning_content` and other fields that chat
            templates read. The last message is the assistant's.
        gold: Final answer, or None if absent.
        tools: JSON schemas of the tools that the assistant may call, or None.
        answer_type: One of `ANSWER_TYPES`, which says how `gold` is to be compared, or None.
        choices: Texts of the options, or None. If given, `gold` is the letter of one of them: A for the first.
    """

    pair_id: str
    lang: str
    messages: list[dict[str, Any]]
    gold: str | None
    tools: list[dict[str, Any]] | None = None
    answer_type: str | None = None
    choices: list[str] | None = None


def message_texts(message: dict[str, Any]) -> list[str]:
    """Return the texts of a message: its content, and its reasoning if it has one."""
    return [message[name] for name in ("content", _REASONING_FIELDS[0]) if name in message]


def has_visible_text(text: str) -> bool:
    """Return whether a text has a character other than white space, zero-width and control characters."""
    # Letters, numbers, punctuation and symbols are visible, and characters that this Unicode version does not know.
    return any(
        unicodedata.category(c)[0] in "LNPS" or unicodedata.category(c) in ("Co", "Cn")
        for c in text
        if c not in _BLANK_LETTERS
    )


def number_text(value: Any) -> str | None:
    """Normalize a gold answer to text, so that equal numbers give equal strings. Numbers are never rounded.

    For example, 8.0, "8" and " 8 " all become "8", and "8,000" becomes "8000". A comma separates thousands in English
    or Indian notation (1,00,000). Other text is only stripped: "1,5" may be 1.5 or two numbers. None returns None.
    """
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = Decimal(text.replace(",", "") if _THOUSANDS.fullmatch(text) else text)
    except InvalidOperation:
        return text
    if not number.is_finite() or abs(number.adjusted()) > 1000:  # a huge exponent would write a huge text
        return text
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def is_number(gold: str | None) -> bool:
    """Return whether a normalized gold answer is a finite number."""
    try:
        return gold is not None and Decimal(gold).is_finite()
    except InvalidOperation:
        return False


def is_language_code(text: str) -> bool:
    """Return whether a text has the form of a language code, such as en or zh-Hant."""
    return bool(_LANG.fullmatch(text))


def spelling_error(langs: Iterable[str]) -> str | None:
    """Return an error message if two language codes differ only in case or in - and _, or None."""
    spellings: dict[str, str] = {}
    for lang in sorted(set(langs)):
        other = spellings.setdefault(lang.lower().replace("_", "-"), lang)
        if other != lang:
            return f"the languages {other} and {lang} are two spellings of one code; use the same in all records"
    return None


def parse_record(raw: Any) -> Record:
    """Check a decoded record and return it.

    Raises UserError if it is not canonical. The message does not contain the file and row.
    """
    if not isinstance(raw, dict):
        raise UserError("not a JSON object; a record looks like {pair_id, lang, question, answer, gold}")
    pair_id, lang = raw.get("pair_id"), raw.get("lang")
    if isinstance(pair_id, int) and not isinstance(pair_id, bool):
        pair_id = str(pair_id)
    if isinstance(pair_id, float | Decimal):  # pandas stores integers as floats in a column with missing values
        raise UserError(f"`pair_id` is {str(pair_id)[:40]}; write it as an integer or a string")
    if not isinstance(pair_id, str) or not pair_id:
        raise UserError("no `pair_id` (a non-empty string that the translations of one example share)")
    if len(pair_id) > 256 or not _is_unicode(pair_id):
        raise UserError("`pair_id` is longer than 256 characters or not valid Unicode")
    if not isinstance(lang, str) or not lang:
        raise UserError("no `lang` (a language code such as en)")
    if not is_language_code(lang):
        raise UserError(f"`lang` is {lang[:40]!a}, not a language code such as en or zh-Hant")
    gold = raw.get("gold")
    if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float | Decimal)):
        raise UserError("`gold` is neither a string nor a number")
    if isinstance(gold, str) and not _is_unicode(gold):
        raise UserError("`gold` is not valid Unicode")
    gold = None if gold is None else str(gold)
    answer_type, choices = _answer_type(raw, gold)
    return Record(pair_id, lang, _messages(raw), gold, _tools(raw.get("tools")), answer_type, choices)


def _answer_type(raw: dict[str, Any], gold: str | None) -> tuple[str | None, list[str] | None]:
    """Return the answer type and the choices of a record. Choices imply the answer type choice."""
    answer_type, choices = raw.get("answer_type"), raw.get("choices")
    if answer_type is not None and answer_type not in ANSWER_TYPES:
        raise UserError(f"`answer_type` is {str(answer_type)[:40]!a}, not one of {', '.join(ANSWER_TYPES)}")
    if choices is None:
        if answer_type == "choice":
            raise UserError("`answer_type` is choice, but there are no `choices` (a list of the texts of the options)")
        return answer_type, None
    if not isinstance(choices, list) or not all(isinstance(text, str) and has_visible_text(text) for text in choices):
        raise UserError("`choices` is not a list of texts")
    if not 2 <= len(choices) <= len(CHOICE_LETTERS):
        raise UserError(f"`choices` has {len(choices)} texts; there must be 2 to {len(CHOICE_LETTERS)}")
    if answer_type not in (None, "choice"):
        raise UserError(f"`choices` are given, but `answer_type` is {answer_type} and not choice")
    letters = CHOICE_LETTERS[: len(choices)]
    if gold is not None and (len(gold) != 1 or gold not in letters):
        raise UserError(
            f"`gold` is {gold[:40]!a}, not the letter of one of the `choices`, {letters[0]} to {letters[-1]}"
        )
    return "choice", choices


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON escapes can encode
        return False
    return True


def _messages(raw: dict[str, Any]) -> list[dict[str, Any]]:
    messages = raw.get("messages")
    if messages is None:
        question, answer = raw.get("question"), raw.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError("neither `messages` nor the strings `question` and `answer`")
        reply = {"role": "assistant", "content": answer, "reasoning_content": raw.get("reasoning_content")}
        messages = [{"role": "user", "content": question}, reply]
    elif not isinstance(messages, list) or not messages:
        raise UserError("`messages` is not a list of {role, content}")
    else:
        messages = [_with_floats(message) for message in messages]
    messages = [_message(message) for message in messages]
    system = raw.get("system")
    if system is not None:
        if not isinstance(system, str):
            raise UserError("`system` is not a string")
        messages = [_message({"role": "system", "content": system}), *messages]
    if messages[-1]["role"] != "assistant" or not has_visible_text(messages[-1]["content"]):
        raise UserError("empty response: the last message must be the assistant's and contain text")
    return messages


def _message(message: Any) -> dict[str, Any]:
    """Return a message without absent fields, and with its reasoning under the first of `_REASONING_FIELDS`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError("`messages` is not a list of {role, content}")
    fields = {key: value for key, value in message.items() if value is not None}
    if fields.get("tool_calls"):
        fields.setdefault("content", "")
    for name in _REASONING_FIELDS:
        if name in fields:
            fields.setdefault(_REASONING_FIELDS[0], fields.pop(name))
    for name in ("content", _REASONING_FIELDS[0]):
        text = fields.get(name, None if name == "content" else "")
        if not isinstance(text, str):
            raise UserError(f"the `{name}` of a {message['role'][:40]!a} message is not a string")
        if not _is_unicode(text):
            raise UserError(f"the `{name}` of a {message['role'][:40]!a} message has a lone surrogate; remove it")
    return fields


def _with_floats(value: Any, depth: int = 0) -> Any:
    """Convert `Decimal`, which JSON readers return for the sake of gold answers, as chat templates expect floats.

    Raises UserError for a value that JSON does not have, such as a timestamp of a Parquet file, and for lists and
    objects that are nested too deeply for the libraries that render them.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"`messages` or `tools` are nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        return {key: _with_floats(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item, depth + 1) for item in value]
    return value if value is None or isinstance(value, str | int | float) else json_number(value)


def json_number(value: Any) -> float:
    """Return a `Decimal` as a float. Raises UserError for a value of a type that JSON does not have."""
    if isinstance(value, Decimal):
        return float(value)
    raise UserError(
        f"a value of type {type(value).__name__}, which JSON does not have; convert it to text or remove it"
    )


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    try:
        tools = _with_floats(json.loads(tools) if isinstance(tools, str) else tools)
    except (ValueError, RecursionError):
        raise UserError("`tools` is not valid JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("`tools` is not a list of JSON schemas")
    return tools


def read_records(paths: list[Path]) -> Iterator[Record]:
    """Yield the records of canonical JSON Lines and Parquet files.

    Raises UserError if a file is missing or empty or a record is malformed; the message names the file and row.
    """
    for row in read_inputs(paths):
        yield row.apply(parse_record)


def format_record(pair_id: str, lang: str, fields: dict[str, Any], gold: str | None) -> dict[str, Any]:
    """Return a canonical record as a dictionary with the keys `pair_id`, `lang`, those of `fields`, and `gold`.

    Args:
        pair_id: Shared by the translations of one example.
        lang: Language code.
        fields: `question` and `answer`, or `messages`, and optionally `system`, `reasoning_content`, `tools`,
            `answer_type` and `choices`.
        gold: Final answer; omitted if None.
    """
    record = {"pair_id": pair_id, "lang": lang, **fields}
    if gold is not None:
        record["gold"] = gold
    return record


def to_json_line(record: dict[str, Any]) -> str:
    """Format a record as a JSON line. Equal records give equal bytes."""
    return json.dumps(record, ensure_ascii=False) + "\n"

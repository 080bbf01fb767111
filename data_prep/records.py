"""Check, read and write canonical records. A record is one conversation in one language."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.readers import read_split, split_inputs
from pipeline.common.errors import UserError

_LANG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class Record(NamedTuple):
    """A training conversation in one language. Records with the same `pair_id` are translations of the same example.

    Attributes:
        pair_id: Shared by the translations of one example.
        lang: Language code.
        messages: `role` and `content` of each message. The last message is the assistant's.
        gold: Final answer, or None if absent.
    """

    pair_id: str
    lang: str
    messages: list[dict[str, str]]
    gold: str | None


def parse_record(raw: Any) -> Record:
    """Check a decoded record and return it.

    Raises UserError if it is not canonical. The message does not contain the file and row.
    """
    if not isinstance(raw, dict):
        raise UserError("not a JSON object; a record looks like {pair_id, lang, question, answer, gold}")
    pair_id, lang = raw.get("pair_id"), raw.get("lang")
    if isinstance(pair_id, int) and not isinstance(pair_id, bool):
        pair_id = str(pair_id)
    if not isinstance(pair_id, str) or not pair_id:
        raise UserError("no `pair_id` (a non-empty string that the translations of one example share)")
    if len(pair_id) > 256 or not _is_unicode(pair_id):
        raise UserError("`pair_id` is longer than 256 characters or not valid Unicode")
    if not isinstance(lang, str) or not lang:
        raise UserError("no `lang` (a language code such as en)")
    if not _LANG.fullmatch(lang):
        raise UserError(f"`lang` is {lang[:40]!a}, not a language code such as en or zh-Hant")
    gold = raw.get("gold")
    if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float | Decimal)):
        raise UserError("`gold` is neither a string nor a number")
    return Record(pair_id, lang, _messages(raw), None if gold is None else str(gold))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON escapes can encode
        return False
    return True


def _messages(raw: dict[str, Any]) -> list[dict[str, str]]:
    messages = raw.get("messages")
    if messages is None:
        question, answer = raw.get("question"), raw.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError("neither `messages` nor the strings `question` and `answer`")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    elif not isinstance(messages, list) or not messages:
        raise UserError("`messages` is not a list of {role, content}")
    else:
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError("`messages` is not a list of {role, content}")
            if not isinstance(message.get("content"), str):
                raise UserError(f"the `content` of a {message['role'][:40]!a} message is not a string")
    system = raw.get("system")
    if system is not None:
        if not isinstance(system, str):
            raise UserError("`system` is not a string")
        messages = [{"role": "system", "content": system}, *messages]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError("empty response: the last message must be the assistant's and contain text")
    return messages


def read_records(paths: list[Path]) -> Iterator[Record]:
    """Yield the records of canonical JSON Lines and Parquet files.

    Raises UserError if a file is missing or empty or a record is malformed; the message names the file and row.
    """
    for split in split_inputs(paths):
        for row in read_split(split):
            yield row.apply(parse_record)


def format_record(pair_id: str, lang: str, fields: dict[str, Any], gold: str | None) -> dict[str, Any]:
    """Return a canonical record as a dictionary with a fixed key order.

    Args:
        pair_id: Shared by the translations of one example.
        lang: Language code.
        fields: `question` and `answer`, or `messages`, and optionally `system`.
        gold: Final answer; omitted if None.
    """
    record = {"pair_id": pair_id, "lang": lang, **fields}
    if gold is not None:
        record["gold"] = gold
    return record


def to_json_line(record: dict[str, Any]) -> str:
    """Format a record as a JSON line. Equal records give equal bytes."""
    return json.dumps(record, ensure_ascii=False) + "\n"

"""Checking, reading and writing of canonical records."""

import json
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records import Record, format_record, parse_record, read_records, to_json_line
from pipeline.common.errors import UserError

GOOD = {"pair_id": "p", "lang": "en", "question": "q", "answer": "a", "gold": 3}


def test_parse_record_accepts_question_and_answer_or_messages():
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "s"}
    assert parse_record(GOOD) == Record("p", "en", [user, assistant], "3")
    chat = {"pair_id": 7, "lang": "en", "messages": [user, assistant], "system": "s"}
    assert parse_record(chat) == Record("7", "en", [system, user, assistant], None)


def test_parse_record_gives_templates_floats():
    """The readers decode fractions as `Decimal`, which no chat template can serialize."""
    messages = [{"role": "user", "content": "q", "weight": Decimal("0.5")}, {"role": "assistant", "content": "a"}]
    record = parse_record({"pair_id": "p", "lang": "en", "messages": messages, "tools": [{"minimum": Decimal("1.5")}]})
    assert json.loads(json.dumps([record.messages, record.tools])) == [
        [{"role": "user", "content": "q", "weight": 0.5}, {"role": "assistant", "content": "a"}],
        [{"minimum": 1.5}],
    ]


def test_parse_record_accepts_reasoning_and_tools():
    record = parse_record({**GOOD, "reasoning_content": "r", "tools": '[{"name": "add"}]'})
    assert record.messages[-1] == {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert record.tools == [{"name": "add"}]
    messages = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "reasoning": "r"}]
    assert parse_record({**GOOD, "messages": messages}).messages == [
        {"role": "user", "content": "q"},
        record.messages[-1],
    ]


@pytest.mark.parametrize("answer", ["\U0001f992", "\u0e50", "-", "\u200bx", "\ue000"])
def test_parse_record_accepts_any_visible_answer(answer):
    assert parse_record({**GOOD, "answer": answer}).messages[-1]["content"] == answer


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_id": None}, "pair_id"),
        ({"pair_id": True}, "pair_id"),
        ({"lang": 3}, "lang"),
        ({"answer": None}, "question"),
        ({"answer": "  "}, "empty response"),
        ({"answer": "\u200b\u2060\ufeff \u00ad"}, "empty response"),
        ({"answer": "\u3164\u2800"}, "empty response"),
        ({"reasoning_content": 3}, "reasoning_content"),
        ({"tools": "{"}, "tools"),
        ({"tools": [1]}, "tools"),
        ({"tools": "[" * 5000 + "]" * 5000}, "`tools` is not valid JSON"),
        ({"tools": "[" * 500 + "]" * 500}, "nested more than 100 levels deep"),
        ({"messages": [{"role": "user", "content": "x", "more": nested(800)}]}, "nested more than 100 levels deep"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"messages": [{"role": "user", "at": datetime(2024, 1, 1)}]}, "a value of type datetime, which JSON does not"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "last message"),
        ({"system": 3}, "system"),
        ({"gold": [1]}, "gold"),
        ({"gold": "\ud800"}, "gold"),
        ({"answer": "a \ud83d"}, "`content` of a 'assistant' message has a lone surrogate"),
        ({"reasoning_content": "\ud83d"}, "reasoning_content"),
        ({"system": "\ud83d"}, "system"),
    ],
)
def test_parse_record_rejects_malformed_record(change, message):
    with pytest.raises(UserError, match=message):
        parse_record({**GOOD, **change})


@pytest.mark.parametrize(("line", "message"), [("[]", "not a JSON object"), ('{"pair_id": 17.0}', "`pair_id` is 17.0")])
def test_read_records_names_row_of_bad_record(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match=f"^{path} row 3: {message}"):
        list(read_records([path]))


def test_read_records_reads_json_lines_and_parquet_alike(tmp_path):
    rows = [{**GOOD, "pair_id": str(i), "gold": "3", "system": None} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(map(to_json_line, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    records = list(read_records([tmp_path / "a.parquet"]))
    assert [record.pair_id for record in records] == [str(i) for i in range(10)]
    assert records == list(read_records([tmp_path / "a.jsonl"]))


def test_read_records_names_row_of_bad_parquet_record(tmp_path):
    rows = [{**GOOD, "lang": None if i == 7 else "en"} for i in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    with pytest.raises(UserError, match=r"a\.parquet row 8: no `lang`"):
        list(read_records([tmp_path / "a.parquet"]))


@pytest.mark.parametrize("gold", ["3", None])
def test_format_record_is_canonical(gold):
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "a"}]
    line = to_json_line(format_record("p", "en", {"messages": messages}, gold))
    assert parse_record(json.loads(line)) == Record("p", "en", messages, gold)
    assert "é" in line and line.endswith("}\n")


def test_parse_record_reads_answer_type_and_choices():
    assert parse_record({**GOOD, "answer_type": "number"})[5:] == ("number", None)
    assert parse_record({**GOOD, "gold": "B", "choices": ["x", "y"]})[5:] == ("choice", ["x", "y"])
    assert parse_record({**GOOD, "gold": None, "answer_type": "choice", "choices": ["x", "y"]}).gold is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer_type": "latex"}, "`answer_type` is 'latex', not one of number, expression, choice, text"),
        ({"answer_type": "choice"}, "`answer_type` is choice, but there are no `choices`"),
        ({"answer_type": "number", "choices": ["x", "y"]}, "`choices` are given, but `answer_type` is number"),
        ({"choices": "xy"}, "`choices` is not a list of texts"),
        ({"choices": ["x", " "]}, "`choices` is not a list of texts"),
        ({"choices": ["x"]}, "`choices` has 1 texts; there must be 2 to 10"),
        ({"choices": ["x", "y"], "gold": "C"}, "`gold` is 'C', not the letter of one of the `choices`, A to B"),
        ({"choices": ["x", "y"], "gold": "x"}, "`gold` is 'x', not the letter"),
    ],
)
def test_parse_record_refuses_answer_types_and_choices(fields, message):
    with pytest.raises(UserError) as error:
        parse_record({**GOOD, **fields})
    assert message in str(error.value)

"""Examples read from canonical records, and malformed records refused in one line."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.errors import UserError
from pipeline.evaluation.dataset import Example, read_examples
from tests.pipeline.evaluation.tiny_model import write_records


def test_read_examples_questions_and_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
    records = [
        {"pair_id": "a", "lang": "en", "question": "1+1?", "gold": "2,000"},
        {"pair_id": "a", "lang": "de", "question": "1+1?", "answer": "2", "gold": 2.0},
        {"pair_id": "b", "lang": "en", "messages": chat, "gold": 5},
        {"pair_id": "b", "lang": "de", "messages": [*chat, {"role": "assistant", "content": "5"}], "gold": "5"},
    ]
    examples = read_examples(write_records(tmp_path / "x.jsonl", records))
    assert examples[0] == Example("a", "en", [{"role": "user", "content": "1+1?"}], Decimal(2000))
    assert examples[1].messages == examples[0].messages
    assert examples[2].messages == chat == examples[3].messages
    assert [example.pair_id for example in read_examples(tmp_path / "x.jsonl", limit=1)] == ["a", "a"]


def test_read_examples_parquet_equals_json_lines(tmp_path):
    rows = [
        {"pair_id": str(i), "lang": lang, "question": f"{i}?", "answer": None, "gold": "1234567890123456.7"}
        for i in range(3)
        for lang in ("en-US", "zh_hans", "SW")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    examples = read_examples(tmp_path / "x.parquet")
    assert examples == read_examples(write_records(tmp_path / "x.jsonl", rows))
    assert [example.lang for example in examples[:3]] == ["en-US", "zh_hans", "SW"]
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "pair_id": "9", "gold": ""}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet row 10: `gold`"):
        read_examples(tmp_path / "x.parquet")


def test_read_examples_refuses_two_spellings_of_a_language(tmp_path):
    codes = {"a": "zh-CN", "b": "zh_CN"}
    records = [{"pair_id": pair_id, "lang": lang, "question": "?", "gold": 1} for pair_id, lang in codes.items()]
    with pytest.raises(UserError, match=r"x\.jsonl: the languages zh-CN and zh_CN are two spellings of one code; use"):
        read_examples(write_records(tmp_path / "x.jsonl", records))


def test_read_examples_of_any_type_and_language(tmp_path):
    records = [
        {"pair_id": "a", "lang": "amh", "question": "?", "gold": r"\frac{1}{2}"},
        {"pair_id": "b", "lang": "xx", "question": "?", "gold": "y", "choices": ["x", "y"]},
        {"pair_id": "c", "lang": "yo-NG", "question": "?", "gold": "Èkó", "answer_type": "auto"},
        {"pair_id": "d", "lang": "swh_Latn", "question": "?", "gold": "7", "answer_type": "text"},
    ]
    examples = read_examples(write_records(tmp_path / "x.jsonl", records))
    assert [(e.gold, e.answer_type, e.choices) for e in examples] == [
        (r"\frac{1}{2}", "expression", ()),
        ("B", "choice", ("x", "y")),
        ("Èkó", "text", ()),
        ("7", "text", ()),
    ]


def test_read_examples_gold_is_exact(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"pair_id": "a", "lang": "en", "question": "?", "gold": 12345678901234567.25}\n')
    assert read_examples(tmp_path / "x.jsonl")[0].gold == Decimal("12345678901234567.25")


GOOD = {"pair_id": "a", "lang": "en", "question": "1+1?", "gold": 2}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty file"),
        (["{"], "row 1: malformed JSON"),
        (["[1]"], "a JSON array; first run: python -m data_prep convert"),
        ([GOOD, {**GOOD, "lang": "de", "gold": None}], "row 2: `gold`"),
        ([{**GOOD, "gold": "eight", "answer_type": "number"}], "row 1: `gold` is 'eight', which is not a number"),
        ([{**GOOD, "gold": "C", "choices": ["1", "2"]}], "row 1: `gold` is 'C', which is not the letter"),
        ([{**GOOD, "answer_type": "integer"}], "row 1: `answer_type` is 'integer'"),
        ([{**GOOD, "gold": [2]}], "row 1: `gold` is neither"),
        ([{**GOOD, "gold": float("nan")}], "row 1: `gold` is missing"),
        ([{**GOOD, "gold": "1,5"}], "row 1: `gold` is '1,5', a decimal or two numbers"),
        ([{k: v for k, v in GOOD.items() if k != "lang"}], "row 1: no `lang`"),
        ([{k: v for k, v in GOOD.items() if k != "question"}], "row 1: neither"),
        ([{**GOOD, "messages": [{"role": "assistant", "content": "5"}]}], "row 1: no message before"),
        ([GOOD, GOOD], "row 2: pair_id 'a' has two records in language 'en'"),
    ],
)
def test_read_examples_refuses_malformed_data(tmp_path, lines, message):
    path = tmp_path / "x.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)

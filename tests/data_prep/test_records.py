import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records import Piece, parse_record, plan_pieces, read_piece
from pipeline.common.errors import UserError

GOOD = {"pair_id": "p", "lang": "en", "question": "q", "answer": "a", "gold": 3}


def read(paths, size=1 << 20):
    return [record for piece in plan_pieces(paths, size) for _, record in read_piece(piece)]


def test_question_and_answer_or_messages_with_or_without_system():
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "s"}
    assert parse_record(GOOD) == ("p", "en", [user, assistant], "3")
    chat = {"pair_id": 7, "lang": "en", "messages": [user, assistant], "system": "s"}
    assert parse_record(chat) == ("7", "en", [system, user, assistant], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_id": None}, "pair_id"),
        ({"pair_id": True}, "pair_id"),
        ({"lang": 3}, "lang"),
        ({"answer": None}, "question"),
        ({"answer": "  "}, "empty response"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "last message"),
        ({"system": 3}, "system"),
        ({"gold": [1]}, "gold"),
    ],
)
def test_what_is_not_canonical_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        parse_record({**GOOD, **change})


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_pieces_give_every_line_once_wherever_they_are_cut(size, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({**GOOD, "pair_id": str(i), "question": "é" * (i % 9)}, ensure_ascii=False) for i in range(50)]
    path.write_text("\ufeff" + "\n".join(lines) + "\n\n", "utf-8")
    assert [record.pair_id for record in read([path], size)] == [str(i) for i in range(50)]


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"pair_id": 1e999999}', b"nul"])
def test_a_bad_line_is_named_by_its_row(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=f"{path} row 3: "):
        read([path], 16)


def test_parquet_is_read_by_row_groups_and_rows_named(tmp_path):
    rows = [{**GOOD, "pair_id": str(i), "gold": "3", "system": None} for i in range(10)]
    rows[7]["lang"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    pieces = plan_pieces([tmp_path / "a.parquet"])
    assert [piece.start for piece in pieces] == [0, 1, 2, 3]
    assert [record.pair_id for _, record in read_piece(pieces[1])] == ["3", "4", "5"]
    with pytest.raises(UserError, match="row 8: no `lang`"):
        list(read_piece(pieces[2]))


def test_pieces_are_a_pure_function_of_the_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"x" * 25)
    assert plan_pieces([tmp_path / "a.jsonl"], 10) == [
        Piece(tmp_path / "a.jsonl", s, min(s + 10, 25)) for s in (0, 10, 20)
    ]

"""Malformed rows of `canonical` and `datasets` input are dropped and counted, or refused with their file and row."""

from datetime import datetime

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.convert.conversion import convert
from data_prep.convert.examples import Source
from pipeline.common.errors import UserError
from tests.data_prep.convert.helpers import run, write_jsonl

REPLY = {"role": "assistant", "content": "y"}


def test_role_that_is_no_string_is_malformed(tmp_path, out):
    good = [{"pair_id": "1", "lang": lang, "messages": [{"from": "gpt", "value": "x"}]} for lang in ("en", "sw")]
    other = {**good[0], "lang": "fr", "messages": [{"from": ["human"], "value": "x"}, *good[0]["messages"]]}
    report, _ = run("canonical", write_jsonl(tmp_path / "a.jsonl", *good, other), output=out)
    assert report.kept == {"en": 1, "sw": 1} and report.drops == {("malformed", "fr"): 1}


@pytest.mark.parametrize("gold", [["Paris", "paris"], {"text": "Paris"}, True])
def test_gold_that_is_neither_string_nor_number_is_malformed(gold, tmp_path, out):
    rows = [{"pair_id": "1", "lang": lang, "question": "x", "answer": "y", "answers": gold} for lang in ("en", "sw")]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    assert run("canonical", path, output=out)[0].kept == {"en": 1, "sw": 1}
    with pytest.raises(UserError, match=r"a\.jsonl row 1: `answers` is neither a string nor a number"):
        run("canonical", path, output=tmp_path / "x.jsonl", columns={"gold": "answers"})


def test_value_that_json_does_not_have_is_refused_with_file_and_row(tmp_path, out):
    rows = [
        {"pair_id": "7", "lang": lang, "messages": [{"role": "user", "content": "x", "at": at}, REPLY]}
        for lang, at in (("en", None), ("sw", datetime(2024, 1, 1)))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 2: pair_id 7 \(sw\): a value of type datetime"):
        run("canonical", tmp_path / "a.parquet", output=out)


def test_lone_surrogate_outside_of_the_texts_is_refused_with_file_and_row(tmp_path, out):
    path = tmp_path / "a.jsonl"
    row = '{"pair_id": "7", "lang": "%s", "question": "x", "answer": "y", "tools": [{"name": "%s"}]}\n'
    path.write_text(row % ("en", "add") + row % ("sw", "\\ud800"))
    with pytest.raises(UserError, match=r"a\.jsonl row 2: pair_id 7 \(sw\): text that is not valid Unicode"):
        run("canonical", path, output=out)
    assert not list(out.parent.iterdir())


def test_datasets_names_row_that_is_not_utf8(tmp_path, out):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(
        b'{"pair_id": "1", "lang": "en", "question": "q", "answer": "\xe0"}\n'
    )
    with pytest.raises(UserError, match=r"data row 1: not valid UTF-8"):
        convert("datasets", Source([str(tmp_path / "data")], {}, "en"), out)


def test_datasets_refuses_damaged_folder(tmp_path, out):
    rows = [{"pair_id": "1", "lang": lang, "question": "q", "answer": "a" * 10_000} for lang in ("en", "sw")]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    (file,) = (tmp_path / "data").glob("*.arrow")
    length = len(rows[0]["answer"]).to_bytes(4, "little")
    assert length in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(length, b"\xff\xff\xff\x7f"))  # the end of the first answer
    with pytest.raises(UserError, match=r"data: damaged \(.*offset"):
        convert("datasets", Source([str(tmp_path / "data")], {}, "en"), out)


def test_canonical_folder_without_tables_is_named(tmp_path, out):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", {"pair_id": "1"})
    with pytest.raises(UserError, match=r"contains no \*\.jsonl or \*\.parquet or \*\.csv or \*\.json"):
        run("canonical", tmp_path, output=out)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="a folder saved by the datasets library; read it with --format datasets"):
        run("canonical", tmp_path, output=out)

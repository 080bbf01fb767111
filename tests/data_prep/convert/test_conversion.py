"""Conversion of canonical records and data sets, from small inputs, and what all formats have in common."""

import json
from datetime import datetime
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.convert.conversion import FORMATS, convert
from data_prep.convert.examples import Source, last_number
from data_prep.records import number_text, parse_record
from pipeline.common.errors import UserError
from tests.data_prep.convert.helpers import run, write_jsonl


def test_canonical_groups_scattered_chats_of_both_kinds(tmp_path, out):
    from_value = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    role_content = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"id": 1, "language": "sw", "conversations": from_value, "gold": None},
        {"id": 2, "language": "sw", "conversations": role_content},
        {"id": 1, "language": "en", "conversations": role_content},
        {"id": 1, "language": "sw", "conversations": role_content},
        {"id": 1, "language": "de", "conversations": role_content[:1]},
    ]
    columns = {"pair_id": "id", "lang": "language", "messages": "conversations"}
    report, records = run("canonical", write_jsonl(tmp_path / "a.jsonl", *rows), output=out, columns=columns)
    assert records == [{"pair_id": "1", "lang": lang, "messages": role_content} for lang in ("en", "sw")]
    assert report.drops == {("language_twice", "sw"): 1, ("no_response", "de"): 1, ("no_pivot", "sw"): 1}


ROWS = [
    {"pair_id": "p", "lang": lang, "question": f"q {lang}", "answer": f"a {lang}", "gold": gold}
    for lang, gold in (("en", "4"), ("sw", "4.0"), ("th", "5"))
]


def test_canonical_parquet_and_datasets_folder_convert_alike(tmp_path, out):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    report, rows = run("canonical", tmp_path / "a.parquet", output=out)
    assert [row["answer"] for row in rows] == ["a en", "a sw"] and report.drops == {("gold_differs", "th"): 1}
    renamed = datasets.Dataset.from_list([{**row, "text": row["answer"]} for row in ROWS]).remove_columns("answer")
    datasets.DatasetDict({"train": renamed}).save_to_disk(tmp_path / "saved")
    assert run("datasets", tmp_path / "saved", output=out, columns={"answer": "text"})[1] == rows
    with pytest.raises(UserError, match=r"no split 'test'; there are train"):
        convert("datasets", Source([str(tmp_path / "saved")], {}, "en", "test"), out)


def test_canonical_drops_half_an_emoji(tmp_path, out):
    """Programs that cut UTF-16 text leave a lone surrogate, which JSON can escape but UTF-8 cannot encode."""
    rows = [{**row, "pair_id": n, "answer": row["answer"] + "\ud83d" * n} for n in (0, 1) for row in ROWS[:2]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, records = run("canonical", path, output=out)
    assert {record["pair_id"] for record in records} == {"0"} and report.drops.total() == 2


def test_canonical_drops_and_counts_malformed_rows(tmp_path, out):
    rows = [*ROWS[:2], {**ROWS[0], "pair_id": None}, {**ROWS[1], "pair_id": "q", "answer": None}]
    rows += [{**ROWS[1], "lang": None}, {**ROWS[2], "answer": " \u200b\ufeff"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report, records = run("canonical", tmp_path / "a.parquet", output=out)
    assert [row["lang"] for row in records] == ["en", "sw"]
    malformed = {("malformed", "en"): 1, ("malformed", "sw"): 1, ("malformed", "?"): 1}
    assert report.drops == {**malformed, ("empty_response", "th"): 1}
    pq.write_table(pa.table({"id": [17.0], "lang": ["en"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet row 1: `id` is 17.0; write it as an integer or a string$"):
        run("canonical", tmp_path / "c.parquet", output=out, columns={"pair_id": "id"})
    pq.write_table(pa.Table.from_pylist(rows[2:5]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet row 1: no `pair_id`; name its column"):
        run("canonical", tmp_path / "b.parquet", output=out)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"instruction": "do", "input": "this", "output": "a"}, "do\n\nthis", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, "do", "a"),
    ],
)
def test_canonical_reads_columns_of_other_libraries(row, question, answer, tmp_path, out):
    path = write_jsonl(tmp_path / "a.jsonl", *({"pair_id": 1, "lang": lang, **row} for lang in ("en", "sw")))
    _, records = run("canonical", path, output=out)
    assert [(row["question"], row["answer"]) for row in records] == [(question, answer)] * 2


def test_canonical_reads_prompt_and_completion_messages_with_reasoning(tmp_path, out):
    prompt, reply = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a", "thinking": "t"}]
    rows = [{"pair_id": 1, "lang": lang, "prompt": prompt, "completion": reply} for lang in ("en", "sw")]
    _, records = run("canonical", write_jsonl(tmp_path / "a.jsonl", *rows), output=out)
    assert records[0]["messages"] == prompt + reply
    assert parse_record(records[0]).messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "t"}


def test_canonical_reads_csv_and_json_arrays_like_json_lines(tmp_path, out):
    expected = run("canonical", write_jsonl(tmp_path / "a.jsonl", *ROWS), output=out)[1]
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    lines = [",".join(f'"{row[name]}"' for name in ROWS[0]) for row in ROWS]
    (tmp_path / "a.csv").write_text("\n".join([",".join(ROWS[0]), *lines]), "utf-8-sig")
    for name in ("a.json", "a.csv"):
        assert run("canonical", tmp_path / name, output=out)[1] == expected
    (tmp_path / "b.csv").write_bytes(b'pair_id,lang\n1,"\xff"\n')
    with pytest.raises(UserError, match=r"b\.csv: not a CSV file"):
        run("canonical", tmp_path / "b.csv", output=out)
    (tmp_path / "c.csv").write_text("pair_id,lang,question,answer\n1,en,What?,First add 3, then 4.\n")
    with pytest.raises(UserError, match=r"c\.csv row 2: more fields than columns; quote fields that contain commas"):
        run("canonical", tmp_path / "c.csv", output=out)


def test_canonical_reads_one_column_per_language(tmp_path, out):
    rows = [
        {"q_en": "one", "a_en": "1", "q_sw": "moja", "a_sw": "1", "number": 1},
        {"q_en": "two", "a_en": "2", "q_sw": None, "a_sw": "2", "number": 2},
    ]
    columns = {"question": "q_{lang}", "answer": "a_{lang}", "gold": "number"}
    path = write_jsonl(tmp_path / "wide.jsonl", *rows)
    report, records = run("canonical", path, output=out, columns=columns, languages=["en", "sw"])
    assert [(row["pair_id"], row["lang"], row["question"], row["gold"]) for row in records] == [
        ("wide-000000001", "en", "one", "1"),
        ("wide-000000001", "sw", "moja", "1"),
    ]
    assert report.drops == {("malformed", "sw"): 1, ("no_translation", "en"): 1}
    with pytest.raises(UserError, match="needs --languages"):
        run("canonical", path, output=out, columns=columns)


def test_canonical_distinguishes_files_of_equal_name(tmp_path, out):
    """Rows of two files are different examples, also if only the folder or the suffix differs."""
    row = {"q_en": "one", "a_en": "1", "q_sw": "moja", "a_sw": "1"}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "wide.jsonl", row)
    (tmp_path / "b" / "wide.json").write_text(json.dumps([row]))
    inputs = [str(tmp_path / name) for name in ("a/wide.jsonl", "b/wide.jsonl", "b/wide.json")]
    source = Source(inputs, {"question": "q_{lang}", "answer": "a_{lang}"}, "en", languages=["en", "sw"])
    report = convert("canonical", source, out)
    assert (report.groups, report.drops) == (3, {})
    assert {json.loads(line)["pair_id"] for line in out.read_text().splitlines()} == {
        "a/wide.jsonl-000000001",
        "b/wide.jsonl-000000001",
        "b/wide.json-000000001",
    }


def test_datasets_reads_translation_dictionaries_and_configurations(tmp_path, out):
    pairs = datasets.Dataset.from_list([{"translation": {"en": "one", "de": "eins"}}])
    pairs.save_to_disk(tmp_path / "saved")
    _, records = run("datasets", tmp_path / "saved", output=out)
    assert [(row["lang"], row["question"], row["answer"]) for row in records] == [("en", "", "one"), ("de", "", "eins")]
    folder, configs = tmp_path / "hub", []
    for lang in ("en", "de"):
        (folder / lang).mkdir(parents=True)
        write_jsonl(folder / lang / "test.jsonl", {"question": f"q {lang}", "answer": "a", "answer_number": 3})
        configs.append(f"- config_name: {lang}\n  data_files:\n  - split: test\n    path: {lang}/test.jsonl\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    source = {"split": "test", "config": "{lang}", "languages": ["en", "de"]}
    _, records = run("datasets", folder, output=out, columns={"gold": "answer_number"}, **source)
    assert [(row["pair_id"], row["lang"], row["question"], row["gold"]) for row in records] == [
        ("hub-000000001", "en", "q en", "3"),
        ("hub-000000001", "de", "q de", "3"),
    ]
    two = [Path(f"{folder}:{lang}") for lang in ("en", "de")]  # one configuration by name, without translations
    _, records = run("datasets", *two, output=out, split="test", unpaired=True)
    assert {(row["pair_id"], row["lang"]) for row in records} == {(f"hub:{c}-000000001", "en") for c in ("en", "de")}
    with pytest.raises(UserError, match=r"hub: cannot be loaded by the datasets library \(.*fr"):
        run("datasets", Path(f"{folder}:fr"), output=out)


def test_datasets_refuses_configurations_of_different_length(tmp_path, out):
    """A missing row would shift all rows after it. Rows with an id of their own need not correspond."""
    configs = []
    for lang, numbers in (("en", (1, 2, 3)), ("de", (1, 3))):
        (tmp_path / lang).mkdir()
        write_jsonl(tmp_path / lang / "a.jsonl", *({"id": n, "question": "q", "answer": f"a{n}"} for n in numbers))
        configs.append(f"- config_name: {lang}\n  data_files: {lang}/a.jsonl\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    source = {"config": "{lang}", "languages": ["en", "de"]}
    with pytest.raises(UserError, match=f"^{tmp_path}: 2 rows in de, but 3 in en; rows must correspond"):
        run("datasets", tmp_path, output=out, **source)
    _, records = run("datasets", tmp_path, output=out, columns={"pair_id": "id"}, **source)
    assert sorted((row["pair_id"], row["answer"]) for row in records) == [("1", "a1")] * 2 + [("3", "a3")] * 2


def test_convert_unpaired_keeps_rows_without_translation(tmp_path, out):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_jsonl(tmp_path / "a.jsonl", {"messages": chat}, {"messages": None}, {"prompt": "q", "completion": "b"})
    with pytest.raises(UserError, match="no `pair_id`"):
        run("canonical", tmp_path / "a.jsonl", output=out)
    report, records = run("canonical", tmp_path / "a.jsonl", output=out, unpaired=True)
    assert {(row["pair_id"], row["lang"]) for row in records} == {("a-000000001", "en"), ("a-000000003", "en")}
    assert report.drops == {("malformed", "en"): 1}
    languages = [{"lang": lang, "question": "q", "answer": "a"} for lang in ("en", "de")]
    report, records = run("canonical", write_jsonl(tmp_path / "b.jsonl", *languages), output=out, unpaired=True)
    assert [row["lang"] for row in records] == ["en"] and report.drops == {("no_pivot", "de"): 1}


@pytest.mark.parametrize("format_name", FORMATS)
def test_convert_rejects_missing_and_foreign_input(format_name, tmp_path, out):
    junk = tmp_path / "junk"
    junk.mkdir()
    for name in ("mgsm_en.tsv", "test_English.json", "en.jsonl", "a.json"):
        (junk / name).write_text('{"some": "thing"}\n')
    for bad in (tmp_path / "missing", junk, junk / "en.jsonl"):
        with pytest.raises(UserError) as error:
            convert(format_name, Source([str(bad)], {}, "en"), out)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_convert_keeps_golds_that_a_float_would_round(tmp_path, out):
    golds = {
        "en": "12345678901234567",
        "sw": "12345678901234568",
        "th": "12345678901234567.0",
        "de": '"12345678901234567"',
    }
    lines = [
        f'{{"pair_id": "p", "lang": "{lang}", "question": "q", "answer": "a", "gold": {gold}}}\n'
        for lang, gold in golds.items()
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    report, rows = run("canonical", tmp_path / "a.jsonl", output=out)
    assert report.drops == {("gold_differs", "sw"): 1}
    assert {row["lang"]: row["gold"] for row in rows} == dict.fromkeys(("en", "de", "th"), "12345678901234567")


def test_canonical_keeps_gold_of_type_text(tmp_path, out):
    rows = [{**row, "answer_type": "text", "gold": "007"} for row in ROWS[:2]]
    assert {row["gold"] for row in run("canonical", write_jsonl(tmp_path / "a.jsonl", *rows), output=out)[1]} == {"007"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8.0", "8"),
        ("1,200", "1200"),
        ("-1,234,567.50", "-1234567.5"),
        ("1,00,000", "100000"),
        ("1,5", "1,5"),
        ("1,2345", "1,2345"),
        ("1,2,3", "1,2,3"),
        (2.5, "2.5"),
        ("-0.0", "0"),
        ("1.20e3", "1200"),
        ("0.12345678901234567890", "0.1234567890123456789"),
        ("1e999999", "1e999999"),
        ("nan", "nan"),
        (100, "100"),
        ("12345678901234567891.50", "12345678901234567891.5"),
        ("x", "x"),
        (None, None),
    ],
)
def test_number_text_normalizes_numbers(text, number):
    assert number_text(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("= 7\n#### 1,234", "1234"), ("答案是12。", "12"), ("৭", "7"), ("-3.5.", "-3.5"), ("none", None)],
)
def test_last_number_reads_digits_of_any_script(text, number):
    assert last_number(text) == number


def test_canonical_refuses_ids_that_mean_different_examples_in_two_files(tmp_path, out):
    """The same pivot in a file per language is one example. Another text with its id is not."""

    def write(name, *answers):
        rows = [{"pair_id": "p", "lang": lang, "question": "q", "answer": answer} for lang, answer in answers]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    first, same = write("a.jsonl", ("en", "one"), ("sw", "moja")), write("b.jsonl", ("en", "one"), ("fr", "un"))
    assert run("canonical", first, same, output=out)[0].kept == {"en": 1, "fr": 1, "sw": 1}
    other = write("c.jsonl", ("en", "two"), ("fr", "deux"))
    with pytest.raises(UserError, match=r"c\.jsonl row 1: pair_id 'p' is another .*a\.jsonl row 1; .*unique"):
        run("canonical", first, other, output=tmp_path / "other.jsonl")


def test_canonical_names_example_with_value_that_json_does_not_have(tmp_path, out):
    messages = [{"role": "user", "content": "x", "at": datetime(2024, 1, 1)}, {"role": "assistant", "content": "y"}]
    rows = [{"pair_id": "7", "lang": lang, "messages": messages} for lang in ("en", "sw")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"7.* \(en\): a value of type datetime, which JSON does not have"):
        run("canonical", tmp_path / "a.parquet", output=out)

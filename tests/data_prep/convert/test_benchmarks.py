"""Benchmarks in the form that their authors publish, with rows written for these tests."""

import json
from pathlib import Path

import pytest

from data_prep.convert.benchmarks import BENCHMARKS
from data_prep.convert.conversion import convert
from data_prep.convert.examples import Source
from data_prep.convert.input_formats import default_pivot
from data_prep.records import parse_record
from pipeline.common.errors import UserError
from tests.data_prep.convert.benchmark_cases import CASES, WINOGRAD_TABLE, belebele, json_lines, mmlu, write, xcopa


def run(name: str, folder: Path, **source):
    output = folder.parent / "out.jsonl"
    report = convert(name, Source([str(folder)], **{"pivot": default_pivot(name), "columns": {}} | source), output)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert all(map(parse_record, rows))  # every converted record is canonical
    return report, rows


def first_group(rows):
    first = [row for row in rows if row["pair_id"] == rows[0]["pair_id"]]
    names = ("lang", "question", "gold", "answer", "answer_type", "choices")
    return [tuple(row.get(name) for name in names) for row in first]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_of_published_form(name, tmp_path):
    files, expected = CASES[name]
    report, rows = run(name, write(tmp_path / "in", files))
    groups = {row["pair_id"]: [] for row in rows}
    for row in rows:
        groups[row["pair_id"]].append(row)
    found = [first_group(group) for group in groups.values()]
    assert expected in found
    dropped = {"pawsx": {("text_missing", "de"): 1, ("no_translation", "en"): 1}}
    assert report.drops == dropped.get(name, {})


def test_benchmarks_keep_pairs_and_levels(tmp_path):
    _, rows = run("polymath", write(tmp_path / "in", CASES["polymath"][0]))
    assert {row["pair_id"] for row in rows} == {f"polymath-{split}-0" for split in ("low", "medium", "high", "top")}
    _, rows = run("polymath", tmp_path / "in", split="top")
    assert [(row["lang"], row["pair_id"]) for row in rows] == [("en", "polymath-top-0"), ("te", "polymath-top-0")]
    _, rows = run("polymath", tmp_path / "in", split="top", languages=["te"], pivot="te", unpaired=True)
    assert [(row["lang"], row["gold"]) for row in rows] == [("te", "2 \\sqrt{2}")]
    with pytest.raises(UserError, match="no file of polymath in xx, which --languages names"):
        run("polymath", tmp_path / "in", languages=["te", "xx"])
    _, rows = run("flores", write(tmp_path / "flores", CASES["flores"][0]))
    assert [(row["lang"], row["pair_id"][-1]) for row in rows] == [
        (lang, i) for i in "01" for lang in ("eng_Latn", "amh_Ethi")
    ]


def test_xwinograd_keeps_examples_of_all_languages(tmp_path):
    """Its languages are not translations of each other. The Hub dataset gives the same examples as the table."""
    _, table = run("xwinograd", write(tmp_path / "table", CASES["xwinograd"][0]))
    assert run("xwinograd", tmp_path / "table", languages=["fr"])[1] == table[1:]
    hub = [
        {"sentence": "The cup doesn't fit into its box because _ is big.", "option1": "The cup", "option2": "box",
         "answer": "1"},
        {"sentence": "Paul parle du vin à Luc car _ écoute.", "option1": "Paul", "option2": "Luc", "answer": "2"},
    ]  # fmt: skip
    files = {f"test/{lang}.jsonl": json_lines(row) for lang, row in zip(("en", "jp"), hub, strict=True)}
    _, lines = run("xwinograd", write(tmp_path / "hub", files))
    assert [row["lang"] for row in table] == ["en", "fr"] and [row["lang"] for row in lines] == ["en", "ja"]
    for name in ("question", "gold", "choices"):
        assert [row[name] for row in table] == [row[name] for row in lines]


def test_parts_of_one_file_are_read_in_order(tmp_path):
    files = {
        f"{lang}/test-0000{part}-of-00002.parquet": [mmlu(lang, f"anatomy/test/{part}", "ABCD"[part])]
        for lang in ("en", "am")
        for part in (1, 0)
    }
    _, rows = run("global_mmlu", write(tmp_path / "x", files))
    assert [(row["lang"], row["gold"]) for row in rows] == [("en", "A"), ("am", "A"), ("en", "B"), ("am", "B")]


def test_benchmark_of_hub_configurations(tmp_path):
    """A dataset of the Hub, here in a folder, has a configuration per language and columns of its own."""
    folder, configs = tmp_path / "hub", []
    for lang in ("en", "sw"):
        rows = [{"question": f"{lang}?", "answer": None, "answer_number": 18, "equation_solution": None}]
        write(folder, {f"{lang}.jsonl": json_lines(*rows)})
        configs.append(f"- config_name: {lang}\n  data_files:\n  - split: test\n    path: {lang}.jsonl\n")
    write(folder, {"README.md": "---\nconfigs:\n" + "".join(configs) + "---\n"})
    output = tmp_path / "x.jsonl"
    convert("mgsm", Source([f"{folder}:{lang}" for lang in ("en", "sw")], {}, "en"), output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["pair_id"], row["lang"], row["question"], row["gold"]) for row in rows] == [
        ("mgsm-000000", lang, f"{lang}?", "18") for lang in ("en", "sw")
    ]
    with pytest.raises(UserError, match=r"nowhere/mgsm: no such file or folder; .*NAME:CONFIG or --config \{lang\}"):
        convert("mgsm", Source(["nowhere/mgsm"], {}, "en"), output)


# For each benchmark a change of its files, and the line that this must end in.
MALFORMED = {
    "mgsm": ({"mgsm_sw.tsv": "Mbili?\n"}, r"mgsm_sw\.tsv row 1: not QUESTION TAB ANSWER"),
    "afrimgsm": ({"data/amh/test.tsv": "question\tgold\nx\t1\n"}, r"test\.tsv row 2: no column `answer_number`"),
    "msvamp": ({"test_Klingon.json": "{}\n"}, r"test_Klingon\.json: unknown language 'Klingon'; known: English"),
    "mmath": ({"mmath/ar.json": '[{"question": "q", "answer": "1"}]'}, r"ar\.json item 1: no column `gid`"),
    "polymath": ({"te/low.parquet": [{"id": "low-te-0", "answer": "1"}]}, r"low\.parquet row 1: no column `question`"),
    "xcopa": (
        {"sw/test.sw.jsonl": json_lines(xcopa("x.", "a.", "b.", "reason", 1, 0))},
        r"test\.sw\.jsonl row 1: no column `connector`",
    ),
    "xwinograd": ({"dataset.tsv": WINOGRAD_TABLE.replace('["it", [9', '["xx", [9')}, r"row 1: the pronoun 'xx' is not"),
    "belebele": (
        {"data/swh_Latn.jsonl": json_lines(belebele("swh_Latn", "u", 1, "5"))},
        r"swh_Latn\.jsonl row 1: `correct_answer_num` is '5', not one of 4 options",
    ),
    "global_mmlu": ({"am/test-00000-of-00001.parquet": "text"}, r"parquet: not a Parquet file"),
    "pawsx": ({"x-final/de/test_2k.tsv": "id\tsentence1\n1\n"}, r"test_2k\.tsv row 2: not as many fields as columns"),
    "flores": ({"devtest/amh_Ethi.devtest": "one\n"}, r"amh_Ethi\.devtest: ends at row 1, other files do not"),
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_malformed_benchmark_is_refused_in_one_line(name, tmp_path):
    change, message = MALFORMED[name]
    folder = write(tmp_path / "in", {**CASES[name][0], **change})
    with pytest.raises(UserError, match=message) as error:
        run(name, folder)
    assert "\n" not in str(error.value) and not (tmp_path / "out.jsonl").exists()


CANDIDATES = [["a", [0, 1], ["a"], True], ["b", [2, 3], ["b"], False]]


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("xcopa", "et/test.et.jsonl", xcopa("x", "a", "b", {"a": 1}, 1, 0), "no column `connector`"),
        ("xwinograd", "en.jsonl", {"candidates": CANDIDATES}, "not a sentence with tokens"),
        ("xwinograd", "en.jsonl", {"candidates": CANDIDATES, "pronoun": ["it", [1, 2], []], "text": 3, "tokens": ["a"]},
         "not a sentence with tokens"),
    ],
)  # fmt: skip
def test_row_of_another_form_is_refused_in_one_line(name, file, row, message, tmp_path):
    with pytest.raises(UserError, match=rf"{file} row 1: {message}"):
        run(name, write(tmp_path / "in", {file: json_lines(row)}))


def test_benchmark_without_pivot_names_languages(tmp_path):
    folder = write(tmp_path / "in", CASES["xcopa"][0])
    with pytest.raises(UserError, match="no file of the pivot en; choose with --pivot one of et, sw"):
        run("xcopa", folder, pivot="en")

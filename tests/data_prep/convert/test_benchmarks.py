"""Benchmarks in the form that their authors publish, with rows written for these tests."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.convert.benchmarks import BENCHMARKS
from data_prep.convert.conversion import convert
from data_prep.convert.examples import Source
from data_prep.convert.input_formats import default_pivot
from data_prep.records import parse_record
from pipeline.common.errors import UserError


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tabs(*rows, **options):
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n", **options).writerows(rows)
    return file.getvalue()


def write(folder: Path, files: dict) -> Path:
    """Write files: texts, or lists of rows as Parquet."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(content), path)
    return folder


def run(name: str, folder: Path, **source):
    output = folder.parent / "out.jsonl"
    report = convert(name, Source([str(folder)], **{"pivot": default_pivot(name), "columns": {}} | source), output)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert all(map(parse_record, rows))  # every converted record is canonical
    return report, rows


def afrimgsm(question, number):
    return (question, "", number, "")


def mmath(lang, gid, answer):
    source = {"data_source": "MATH500", "data_source_id": 7}
    return {"question": f"{lang} ${gid}$?", "answer": answer, **source, "lang": lang, "gid": gid}


def xcopa(premise, one, two, kind, label, idx):
    choices = {"premise": premise, "choice1": one, "choice2": two, "question": kind}
    return {**choices, "label": label, "idx": idx, "changed": False}


def belebele(lang, link, number, correct):
    answers = {f"mc_answer{i}": f"{lang} {i}" for i in (1, 2, 3, 4)}
    texts = {"flores_passage": f"{lang} passage.", "question": f"{lang} which? "}
    place = {"link": link, "question_number": number, "correct_answer_num": correct}
    return {**place, **texts, **answers, "dialect": lang, "ds": "2023-05-03"}


def mmlu(lang, sample, answer):
    options = {f"option_{letter}": f"{lang} {letter}" for letter in "abcd"}
    return {"sample_id": sample, "subject": "anatomy", "question": f"{lang}?", **options, "answer": answer}


PAWS_HEADER = ("id", "sentence1", "sentence2", "label")
WINOGRAD = (
    ("en", "original", "?", "The cup doesn't fit into its box because it is big.",
     ["The", "cup", "does", "n't", "fit", "into", "its", "box", "because", "it", "is", "big", "."],
     ["it", [9, 10], ["it"]],
     [["The cup", [0, 2], ["The", "cup"], True], ["box", [7, 8], ["box"], False]]),
    ("fr", "original", "?", "Paul parle du vin à Luc car il écoute.",
     ["Paul", "parle", "de", "le", "vin", "à", "Luc", "car", "il", "écoute", "."],
     ["il", [8, 9], ["il"]],
     [["Paul", [0, 1], ["Paul"], False], ["Luc", [6, 7], ["Luc"], True]]),
)  # fmt: skip
WINOGRAD_TABLE = "".join("\t".join([*row[:4], *map(json.dumps, row[4:])]) + "\n" for row in WINOGRAD)


# For each benchmark its files, and the first group that they give: (lang, question, gold, answer, type, choices).
CASES = {
    "mgsm": (
        {"mgsm_en.tsv": "Two and one?\t3\nSix?\t1,200\n", "mgsm_sw.tsv": "Mbili?\t3\nSita?\t1200\n"},
        [("en", "Two and one?", "3", "3", "number", None), ("sw", "Mbili?", "3", "3", "number", None)],
    ),
    "afrimgsm": (
        {
            f"data/{lang}/{split}.tsv": tabs(
                ("question", "answer", "answer_number", "equation_solution"),
                afrimgsm(f'"{lang} quoted", first?', 18),
                afrimgsm(f"{lang}?", 3),
            )
            for lang in ("eng", "amh")
            for split in ("dev", "test")
        },
        [(lang, f'"{lang} quoted", first?', "18", "18", "number", None) for lang in ("eng", "amh")],
    ),
    "msvamp": (
        {
            "test_English.json": json_lines({"m_query": "how many ?", "response": "8.0", "equation": "- n0 n1"}),
            "test_Thai.json": json_lines({"query": "how many ?", "m_query": " กี่ ?", "response": "8.0"}),
        },
        [("en", "how many ?", "8", "8", "number", None), ("th", "กี่ ?", "8", "8", "number", None)],
    ),
    "mmath": (
        {
            "mmath/en.json": json.dumps([mmath("en", 8, "\\frac{1}{2}"), mmath("en", 9, "204")], indent=1),
            "mmath/ar.json": json.dumps([mmath("ar", 9, "204"), mmath("ar", 8, "\\dfrac{1}{2}")], indent=1),
            "train/enSFT-3k.json": "[]",
        },
        [
            ("en", "en $8$?", "\\frac{1}{2}", "\\frac{1}{2}", "expression", None),
            ("ar", "ar $8$?", "\\dfrac{1}{2}", "\\dfrac{1}{2}", "expression", None),
        ],
    ),
    "polymath": (
        {
            f"{lang}/{split}.parquet": [
                {"id": f"{split}-{lang}-0", "question": f"{lang} {split}?", "answer": "$2 \\sqrt{2}$"}
            ]
            for lang in ("en", "te")
            for split in ("low", "medium", "high", "top")
        },
        [(lang, f"{lang} high?", "2 \\sqrt{2}", "2 \\sqrt{2}", "expression", None) for lang in ("en", "te")],
    ),
    "xcopa": (
        {
            "et/test.et.jsonl": json_lines(xcopa("Kraan avati.", "See lekkis.", "Vesi voolas.", "effect", 1, 0)),
            "sw/test.sw.jsonl": json_lines(xcopa("Bomba lilifunguliwa.", "Lilivuja.", "Maji.", "effect", 1, 0)),
            "sw/val.sw.jsonl": json_lines(xcopa("x.", "a.", "b.", "cause", 1, 0)),
        },
        [
            ("et", "Kraan avati seetõttu\nA. See lekkis.\nB. Vesi voolas.", "B", "B. Vesi voolas.", "choice",
             ["See lekkis.", "Vesi voolas."]),
            ("sw", "Bomba lilifunguliwa kwa hiyo\nA. Lilivuja.\nB. Maji.", "B", "B. Maji.", "choice",
             ["Lilivuja.", "Maji."]),
        ],
    ),
    "xwinograd": (
        {"dataset.tsv": WINOGRAD_TABLE},
        [("en", "The cup doesn't fit into its box because _ is big.\nA. The cup\nB. box", "A", "A. The cup", "choice",
          ["The cup", "box"])],
    ),
    "belebele": (
        {
            "data/eng_Latn.jsonl": json_lines(belebele("eng_Latn", "u", 1, "2"), belebele("eng_Latn", "u", 2, "4")),
            "data/swh_Latn.jsonl": json_lines(belebele("swh_Latn", "u", 2, "4"), belebele("swh_Latn", "u", 1, "2")),
        },
        [
            (lang, f"{lang} passage.\n\n{lang} which?\nA. {lang} 1\nB. {lang} 2\nC. {lang} 3\nD. {lang} 4", "B",
             f"B. {lang} 2", "choice", [f"{lang} {i}" for i in (1, 2, 3, 4)])
            for lang in ("eng_Latn", "swh_Latn")
        ],
    ),
    "global_mmlu": (
        {
            f"{lang}/{split}-00000-of-00001.parquet": [mmlu(lang, f"anatomy/{split}/0", "C")]
            for lang in ("en", "am")
            for split in ("test", "dev")
        },
        [
            (lang, f"{lang}?\nA. {lang} a\nB. {lang} b\nC. {lang} c\nD. {lang} d", "C", f"C. {lang} c", "choice",
             [f"{lang} {i}" for i in "abcd"])
            for lang in ("en", "am")
        ],
    ),
    "pawsx": (
        {
            "x-final/en/test_2k.tsv": tabs(
                PAWS_HEADER, (1, '"He" came .', "Came he .", 0), (2, "A .", "B .", 1), quoting=csv.QUOTE_NONE,
                quotechar=None,
            ),
            "x-final/de/test_2k.tsv": tabs(PAWS_HEADER, (2, "NS", "NS", 1), (1, "Er kam .", "Kam er .", 0)),
        },
        [
            ("en", '"He" came, right? _, Came he .\nA. No\nB. Yes', "A", "A. No", "choice", ["No", "Yes"]),
            ("de", "Er kam, richtig? _, Kam er .\nA. Nein\nB. Ja", "A", "A. Nein", "choice", ["Nein", "Ja"]),
        ],
    ),
    "flores": (
        {f"{split}/{lang}.{split}": f"{lang} one\n{lang} two\n" for lang in ("eng_Latn", "amh_Ethi")
         for split in ("dev", "devtest")},
        [(lang, "", None, f"{lang} one", None, None) for lang in ("eng_Latn", "amh_Ethi")],
    ),
}  # fmt: skip


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


def test_benchmark_without_pivot_names_languages(tmp_path):
    folder = write(tmp_path / "in", CASES["xcopa"][0])
    with pytest.raises(UserError, match="no file of the pivot en; choose with --pivot one of et, sw"):
        run("xcopa", folder, pivot="en")

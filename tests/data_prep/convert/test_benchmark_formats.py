"""Conversion of the benchmarks' own formats, from small inputs in their real schemas."""

import json

import pytest

from pipeline.common.errors import UserError
from tests.data_prep.convert.helpers import run, write_jsonl


def test_mgsm_pairs_rows_by_index(tmp_path, out):
    (tmp_path / "mgsm_en.tsv").write_text("Two apples and\tone?\t3\nA house for $70,000?\t70000\nSix?\t6\n", "utf-8")
    (tmp_path / "mgsm_sw.tsv").write_text("Matufaha mawili?\t3\nNyumba?\t70,000\nSita?\t7\n", "utf-8")
    report, rows = run("mgsm", tmp_path, output=out)
    assert [(row["lang"], row["gold"]) for row in rows] == [("en", "3"), ("sw", "3"), ("en", "70000"), ("sw", "70000")]
    assert rows[0]["question"] == "Two apples and\tone?" and rows[0]["pair_id"] == rows[1]["pair_id"]
    assert report.drops == {("gold_differs", "sw"): 1, ("no_translation", "en"): 1}


def test_mgsm_keeps_answer_of_minus_one(tmp_path, out):
    for lang in ("en", "sw"):
        (tmp_path / f"mgsm_{lang}.tsv").write_text("2 - 3?\t-1\n", "utf-8")
    assert [row["gold"] for row in run("mgsm", tmp_path, output=out)[1]] == ["-1", "-1"]


def test_msvamp_pairs_rows_by_english_question(tmp_path, out):
    def row(question, gold, **more):
        return {**more, "equation": "- n0 n1", "response": gold, "m_query": question}

    write_jsonl(tmp_path / "test_English.json", row("how many ?", "8.0"), row("and now ?", "2.5"))
    swahili = [row("Ngapi?", "8.0", query="how many ?"), row("Sasa?", "2.5", query="something else ?")]
    write_jsonl(tmp_path / "test_Swahili.json", *swahili)
    report, rows = run("msvamp", tmp_path, output=out)
    assert [(row["lang"], row["question"], row["answer"]) for row in rows] == [
        ("en", "how many ?", "8"),
        ("sw", "Ngapi?", "8"),
    ]
    assert report.drops == {("other_english_question", "sw"): 1, ("no_translation", "en"): 1}


def test_mcot_keeps_correct_rows_and_strips_prompt(tmp_path, out):
    def row(question, response, correct, answer=8.0):
        prompt = f"Question:\n{question}\nAnswer:\nLet's think step by step.\n"
        return {"question": prompt, "response": response, "prediction": 8.0, "answer": answer, "result": correct}

    write_jsonl(tmp_path / "en.jsonl", row("a ?", "So 8.", True), row("b ?", "9", False), row("c ?", "8", True))
    write_jsonl(tmp_path / "sw.jsonl", row("A?", "Jibu 8.", True), row("B?", "8", True), row("C?", "9", False))
    write_jsonl(tmp_path / "th.jsonl", row("x", "8", True, 9.0), row("y", "8", True), row("z", "8", True))
    report, rows = run("mcot", tmp_path, output=out)
    assert [(row["lang"], row["question"], row["answer"], row["gold"]) for row in rows] == [
        ("en", "a ?", "So 8.", "8"),
        ("sw", "A?", "Jibu 8.", "8"),
        ("en", "c ?", "8", "8"),
        ("th", "z", "8", "8"),
    ]
    wrong = {("wrong_answer", "en"): 1, ("wrong_answer", "sw"): 1, ("gold_differs", "th"): 1}
    assert report.drops == {**wrong, ("no_pivot", "sw"): 1, ("no_pivot", "th"): 1}
    assert report.lines()[0] == "2 groups, 4 records: en 2, sw 1, th 1"


@pytest.mark.parametrize("result", [{}, {"result": None}])
def test_mcot_without_result_keeps_rows(result, tmp_path, out):
    for lang in ("en", "sw"):
        write_jsonl(tmp_path / f"{lang}.jsonl", {"question": "q", "response": "So 8.", "answer": 8.0, **result})
    assert len(run("mcot", tmp_path, output=out)[1]) == 2


def octopus(lang: str, question: str, answer: str) -> dict:
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request in "
        f"{lang}. Please answer in {lang}.\n\n### Instruction:\n{question}\n\n### Response:"
    )
    return {"prompt": prompt, "chosen": answer, "reject": ""}


def test_mathoctopus_pairs_parallel_set_by_numbers(tmp_path, out):
    rows = [
        octopus("English", "Tom has 3 apples and 4 pears. How many?", "3 + 4 = 7\n#### 7"),
        octopus("English", "Ann had 9 and 2?", "9 - 2 = 7\n#### 7"),
        octopus("English", "Bob had 2 and 9?", "9 - 2 = 7\n#### 7"),
        octopus("Swahili", "Tom ana matufaha 3 na mapeasi 4.\n\nNgapi?", "3 + 4 = 7\n#### 7"),
        octopus("Bengali", "টমের ৩টি আপেল এবং ৪টি নাশপাতি আছে?", "৩ + ৪ = ৭\n#### ৭"),
        octopus("German", "Ann hatte 9 und 2?", "9 - 2 = 7\n#### 7"),
        octopus("German", "Tom hat 3 und 4?", "3 + 4 = 8\n#### 8"),
    ]
    report, records = run("mathoctopus", write_jsonl(tmp_path / "parallel.json", *rows), output=out)
    assert [row["lang"] for row in records] == ["en", "bn", "sw"]
    assert records[2]["question"] == "Tom ana matufaha 3 na mapeasi 4.\n\nNgapi?" and records[1]["gold"] == "7"
    assert report.drops[("ambiguous_pair", "de")] == 1 and report.drops[("no_pair_found", "de")] == 1


def test_mathoctopus_pairs_numbers_in_the_notation_of_each_language(tmp_path, out):
    rows = [
        octopus("English", "1,200 and 2.5 of 50000?", "1,200 x 2.5 = 3,000\n#### 3,000"),
        octopus("German", "1.200 und 2,5 von 50.000?", "1.200 x 2,5 = 3.000\n#### 3.000"),
        octopus("French", "1 200 et 2,5 de 50\u202f000 ?", "1 200 x 2,5 = 3 000\n#### 3 000"),
        octopus("Bengali", "১,২০০ এবং ২.৫, ৫০,০০০?", "৩০০০"),
        octopus("Russian", "1200 и 2,5 из 50000?", "3000,5"),
    ]
    report, records = run("mathoctopus", write_jsonl(tmp_path / "parallel.json", *rows), output=out)
    assert [row["lang"] for row in records] == ["en", "bn", "de", "fr"]
    assert {row["gold"] for row in records} == {"3000"}
    assert report.drops == {("no_pair_found", "ru"): 1}


def test_mathoctopus_pairs_cross_set_by_question(tmp_path, out):
    rows = [octopus("English", "q 1?", "5"), octopus("Thai", "q 1?", "5"), octopus("French", "q 1?", "6")]
    report, records = run("mathoctopus", write_jsonl(tmp_path / "cross.json", *rows), output=out)
    assert [row["lang"] for row in records] == ["en", "th"]
    assert report.drops == {("gold_differs", "fr"): 1}


def test_parallel_pairs_lines_by_index(tmp_path, out):
    (tmp_path / "train.en").write_text("one\n\nthree\n", "utf-8")
    (tmp_path / "train.de").write_text("eins\r\nzwei\ndrei", "utf-8")
    report, rows = run("parallel", tmp_path / "train.en", tmp_path / "train.de", output=out)
    assert [(row["lang"], row["answer"]) for row in rows] == [
        ("en", "one"),
        ("de", "eins"),
        ("en", "three"),
        ("de", "drei"),
    ]
    assert report.drops == {("empty_response", "en"): 1, ("no_pivot", "de"): 1}


def test_mgsm_rejects_files_of_different_length(tmp_path, out):
    (tmp_path / "mgsm_en.tsv").write_text("a\t1\nb\t2\n")
    (tmp_path / "mgsm_sw.tsv").write_text("a\t1\n")
    with pytest.raises(UserError, match=r"mgsm_sw.tsv: ends at row 1"):
        run("mgsm", tmp_path, output=out)


@pytest.mark.parametrize("format_name", ["parallel", "mcot", "mgsm", "msvamp"])
def test_benchmark_folders_with_equal_file_names_are_refused(format_name, tmp_path, out):
    """The files of the second folder must not replace those of the first without a word."""
    row = json.dumps({"question": "q", "m_query": "q", "response": "8", "answer": 8.0})
    name, line = {
        "parallel": ("train.{}", "one"),
        "mcot": ("{}.jsonl", row),
        "mgsm": ("mgsm_{}.tsv", "q\t3"),
        "msvamp": ("test_{}.json", row),
    }[format_name]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for lang in ("English", "German") if format_name == "msvamp" else ("en", "de"):
            (tmp_path / folder / name.format(lang)).write_text(line + "\n")
    with pytest.raises(UserError, match=r"b/.*: same name as .*a/.*; convert one folder at a time"):
        run(format_name, tmp_path / "a", tmp_path / "b", output=out)

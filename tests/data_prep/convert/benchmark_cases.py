"""Small benchmarks in the form that their authors publish."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


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

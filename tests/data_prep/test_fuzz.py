"""Corrupted input is accepted correctly or rejected with a one-line error, without traceback or partial output."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.convert.conversion import convert
from data_prep.convert.examples import Source
from data_prep.packing import packer
from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks
from data_prep.records import parse_record
from data_prep.shards.verification import verify
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import UserError

WRONG = [
    None,
    True,
    3,
    -1.5,
    1e308,
    "",
    " ",
    [],
    {},
    [[]],
    "x" * 100_000,
    "\ud800",
    "\x00",
    "é" * 50,
    "</s>",
    "▁",
    "<|user|>",
]
JUNK = [
    b"\x00",
    b"\xff",
    b"\r",
    b"{",
    b'"',
    b"\\u",
    b"\xef\xbb\xbf",
    b"\xf0\x9f",
    b"[" * 5000,
    b"NaN",
    b"1e999",
    b"\n\n",
]


def flip_bytes(rng: random.Random, data: bytes) -> bytes:
    corrupted = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        corrupted[rng.randrange(len(corrupted))] ^= 1 << rng.randrange(8)
    return bytes(corrupted)


def cut(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[stop:] if rng.random() < 0.5 else data[start:stop]


def insert(rng: random.Random, data: bytes) -> bytes:
    position = rng.randrange(len(data) + 1)
    return data[:position] + rng.choice(JUNK) + data[position:]


def change_type(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    position = rng.randrange(len(lines) - 1)
    record = json.loads(lines[position])
    key = rng.choice([*record, "messages", "system", "new"])
    if rng.random() < 0.3:
        record.pop(key, None)
    else:
        record[key] = rng.choice(WRONG)
    lines[position] = json.dumps(record).encode()
    return b"\n".join(lines)


def shuffle_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines[: rng.randrange(1, len(lines) + 1)])


def encode(rng: random.Random, data: bytes) -> bytes:
    encoding = rng.choice(["utf-16", "utf-8-sig", "cp1252", "utf-32", "gb18030"])
    half = data.find(b"\n", rng.randrange(len(data))) + 1
    return data[:half] + data[half:].decode().encode(encoding, "replace")


CORRUPTIONS = [flip_bytes, cut, insert, change_type, shuffle_lines, encode]


def outcome(work) -> str:
    """Return "accepted" or "rejected" for one input. Anything except success or a one-line UserError propagates."""
    try:
        work()
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, message[:300]
        return "rejected"
    return "accepted"


@pytest.fixture
def original(demo_file) -> bytes:
    return b"".join(demo_file.read_bytes().splitlines(keepends=True)[:24])


@pytest.fixture
def loaded_once(monkeypatch, tokenizer_dir):
    """Make `pack` use one loaded tokenizer instead of loading it for every input."""
    tokenizer = load_tokenizer(tokenizer_dir)
    monkeypatch.setattr(packer, "load_tokenizer", lambda name, **settings: tokenizer)


@pytest.mark.slow
def test_pack_survives_corrupted_json_lines(original, loaded_once, tmp_path):
    counts = {"accepted": 0, "rejected": 0}
    for number in range(200):
        rng = random.Random(number)
        data = rng.choice(CORRUPTIONS)(rng, original)
        if rng.random() < 0.3:
            data = rng.choice(CORRUPTIONS[:3])(rng, data) if data else data
        source, output = tmp_path / f"{number}.jsonl", tmp_path / f"out-{number}"
        source.write_bytes(data)
        settings = PackSettings(
            max_seq_length=512,
            truncate=rng.random() < 0.5,
            max_sequences_per_row=rng.choice([0, 2]),
            on_bad_record=rng.choice(["error", "error", "skip"]),
        )
        result = outcome(lambda: pack([source], "", output, settings, Ranks()))  # noqa: B023
        counts[result] += 1
        assert output.exists() == (result == "accepted"), number
        assert not output.with_name(f"out-{number}.partial").exists()
        if result == "accepted":
            verify(output)
    assert min(counts.values()) > 25, counts


@pytest.mark.slow
def test_pack_survives_corrupted_parquet(original, loaded_once, tmp_path):
    good = tmp_path / "good.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in original.splitlines()]), good)
    for number in range(100):
        rng = random.Random(number)
        data = rng.choice([flip_bytes, cut, insert])(rng, good.read_bytes())
        source, output = tmp_path / f"{number}.parquet", tmp_path / f"out-{number}"
        source.write_bytes(data)
        result = outcome(lambda: pack([source], "", output, PackSettings(max_seq_length=512), Ranks()))  # noqa: B023
        assert output.exists() == (result == "accepted"), number
        assert not output.with_name(f"out-{number}.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["canonical", "mcot", "msvamp", "mgsm", "mathoctopus", "parallel"])
def test_convert_survives_corrupted_input(format_name, original, tmp_path):
    rows = [json.loads(line) for line in original.splitlines()]
    names = {"mcot": "{}.jsonl", "msvamp": "test_{}.json", "mgsm": "mgsm_{}.tsv", "parallel": "a.{}"}
    for number in range(80):
        rng = random.Random(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        for lang, name in (("en", "English"), ("fr", "French")):
            selected = [row for row in rows if row["lang"] == lang]
            data = "".join(format_row(format_name, row, name) for row in selected).encode()
            if lang == "fr" or rng.random() < 0.3:
                is_text = format_name in ("mgsm", "parallel")
                data = rng.choice([c for c in CORRUPTIONS if not is_text or c is not change_type])(rng, data)
            name_in_format = names.get(format_name, "{}.jsonl").format(name if format_name == "msvamp" else lang)
            (folder / name_in_format).write_bytes(data)
        output = tmp_path / f"{number}.out"
        result = outcome(lambda: convert(format_name, Source([str(folder)], {}, "en"), output))  # noqa: B023
        assert output.exists() == (result == "accepted")
        if result == "accepted":
            for line in output.read_bytes().splitlines():
                parse_record(json.loads(line))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp") or path.name.startswith(".convert")]


def format_row(format_name: str, row: dict, name: str) -> str:
    """Return a demo record in the schema of another format."""
    question, answer, gold = row["question"], row["answer"], row["gold"]
    if format_name == "mgsm":
        return f"{question}\t{gold}\n"
    if format_name == "parallel":
        return answer + "\n"
    prompt = f"... in {name}. Please answer in {name}.\n\n### Instruction:\n{question}\n\n### Response:"
    rows = {
        "canonical": row,
        "mcot": {"question": f"Question:\n{question}\nAnswer:\n", "response": answer, "answer": gold, "result": True},
        "msvamp": {"m_query": question, "response": gold},
        "mathoctopus": {"prompt": prompt, "chosen": answer},
    }
    return json.dumps(rows[format_name], ensure_ascii=False) + "\n"


def test_corruptions_change_the_input(original):
    assert {corrupt(random.Random(1), original) == original for corrupt in CORRUPTIONS} == {False}

"""Mangled input: accepted rightly or refused with one line; never a traceback, never a partial output."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.convert.conversion import convert
from data_prep.convert.input_formats import Source
from data_prep.packing import packer as pack_module
from data_prep.packing.packer import PackSettings, pack
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
    mangled = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        mangled[rng.randrange(len(mangled))] ^= 1 << rng.randrange(8)
    return bytes(mangled)


def cut(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[stop:] if rng.random() < 0.5 else data[start:stop]


def insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(JUNK) + data[place:]


def change_type(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    place = rng.randrange(len(lines) - 1)
    record = json.loads(lines[place])
    key = rng.choice([*record, "messages", "system", "new"])
    if rng.random() < 0.3:
        record.pop(key, None)
    else:
        record[key] = rng.choice(WRONG)
    lines[place] = json.dumps(record).encode()
    return b"\n".join(lines)


def shuffle_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines[: rng.randrange(1, len(lines) + 1)])


def encode(rng: random.Random, data: bytes) -> bytes:
    encoding = rng.choice(["utf-16", "utf-8-sig", "cp1252", "utf-32", "gb18030"])
    half = data.find(b"\n", rng.randrange(len(data))) + 1
    return data[:half] + data[half:].decode().encode(encoding, "replace")


MANGLERS = [flip_bytes, cut, insert, change_type, shuffle_lines, encode]


def outcome(work) -> str:
    """What became of one input; anything but success or a one-line UserError propagates."""
    try:
        work()
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, message[:300]
        return "refused"
    return "accepted"


@pytest.fixture
def original(demo_file) -> bytes:
    return b"".join(demo_file.read_bytes().splitlines(keepends=True)[:24])


@pytest.fixture
def loaded_once(monkeypatch, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    monkeypatch.setattr(pack_module, "load_tokenizer", lambda name: tokenizer)


@pytest.mark.slow
def test_pack(original, loaded_once, tmp_path):
    seen = {"accepted": 0, "refused": 0}
    for number in range(1600):
        rng = random.Random(number)
        data = rng.choice(MANGLERS)(rng, original)
        if rng.random() < 0.3:
            data = rng.choice(MANGLERS[:3])(rng, data) if data else data
        source, output = tmp_path / f"{number}.jsonl", tmp_path / f"out-{number}"
        source.write_bytes(data)
        settings = PackSettings(
            max_seq_length=512, truncate=rng.random() < 0.5, max_sequences_per_row=rng.choice([0, 2])
        )
        found = outcome(lambda: pack([source], "", output, settings, Ranks()))  # noqa: B023
        seen[found] += 1
        assert output.exists() == (found == "accepted"), number
        assert not output.with_name(f"out-{number}.partial").exists()
        if found == "accepted":
            verify(output)
    assert min(seen.values()) > 100, seen


@pytest.mark.slow
def test_pack_parquet(original, loaded_once, tmp_path):
    good = tmp_path / "good.parquet"
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in original.splitlines()]), good)
    for number in range(300):
        rng = random.Random(number)
        data = rng.choice([flip_bytes, cut, insert])(rng, good.read_bytes())
        source, output = tmp_path / f"{number}.parquet", tmp_path / f"out-{number}"
        source.write_bytes(data)
        found = outcome(lambda: pack([source], "", output, PackSettings(max_seq_length=512), Ranks()))  # noqa: B023
        assert output.exists() == (found == "accepted"), number
        assert not output.with_name(f"out-{number}.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["canonical", "mcot", "msvamp", "mgsm", "mathoctopus", "parallel"])
def test_convert(form, original, tmp_path):
    rows = [json.loads(line) for line in original.splitlines()]
    names = {"mcot": "{}.jsonl", "msvamp": "test_{}.json", "mgsm": "mgsm_{}.tsv", "parallel": "a.{}"}
    for number in range(150):
        rng = random.Random(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        for lang, name in (("en", "English"), ("fr", "French")):
            mine = [row for row in rows if row["lang"] == lang]
            data = "".join(spell(form, row, name) for row in mine).encode()
            if lang == "fr" or rng.random() < 0.3:
                mangle = rng.choice([m for m in MANGLERS if form not in ("mgsm", "parallel") or m is not change_type])
                data = mangle(rng, data)
            spelt = names.get(form, "{}.jsonl").format(name if form == "msvamp" else lang)
            (folder / spelt).write_bytes(data)
        output = tmp_path / f"{number}.out"
        found = outcome(lambda: convert(form, Source([str(folder)], {}, "en"), output))  # noqa: B023
        assert output.exists() == (found == "accepted")
        if found == "accepted":
            for line in output.read_bytes().splitlines():
                parse_record(json.loads(line))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp") or path.name.startswith(".convert")]


def spell(form: str, row: dict, name: str) -> str:
    """A demo record in the schema of a format."""
    question, answer, gold = row["question"], row["answer"], row["gold"]
    if form == "mgsm":
        return f"{question}\t{gold}\n"
    if form == "parallel":
        return answer + "\n"
    prompt = f"... in {name}. Please answer in {name}.\n\n### Instruction:\n{question}\n\n### Response:"
    spelt = {
        "canonical": row,
        "mcot": {"question": f"Question:\n{question}\nAnswer:\n", "response": answer, "answer": gold, "result": True},
        "msvamp": {"m_query": question, "response": gold},
        "mathoctopus": {"prompt": prompt, "chosen": answer},
    }
    return json.dumps(spelt[form], ensure_ascii=False) + "\n"


def test_every_mangler_changes_something(original):
    assert {mangle(random.Random(1), original) == original for mangle in MANGLERS} == {False}

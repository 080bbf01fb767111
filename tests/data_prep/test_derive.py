"""Shuffled pairs and question translation, from small and from generated records, and packed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.derive import KINDS, derive
from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks
from data_prep.shards.format import ShardSet
from pipeline.common.errors import UserError
from tests.conftest import Prepared


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def response(record: dict) -> str:
    return record["messages"][-1]["content"] if "messages" in record else record["answer"]


def test_shuffled_pairs_keep_texts_but_no_pair(prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "shuffled.jsonl"
    counts = derive("shuffled_pairs", [prepared.data], output, seed=3)
    before, after = read(prepared.data), read(output)
    translations = [record for record in after if record["lang"] != "en"]
    assert counts == {"written": len(before), "changed": len(translations)}
    assert [(r["lang"], response(r)) for r in after] == [(r["lang"], response(r)) for r in before]
    assert Counter((r["lang"], r["pair_id"]) for r in after) == Counter((r["lang"], r["pair_id"]) for r in before)
    for old, new in zip(before, after, strict=True):
        assert (old["pair_id"] == new["pair_id"]) == (old["lang"] == "en")
    assert not any("gold" in record for record in after)

    again = tmp_path / "again.jsonl"
    derive("shuffled_pairs", [prepared.data], again, seed=3)
    assert again.read_bytes() == output.read_bytes()
    derive("shuffled_pairs", [prepared.data], again, seed=4)
    assert again.read_bytes() != output.read_bytes()

    manifest = pack([output], str(prepared.tokenizer), tmp_path / "shards", PackSettings(max_seq_length=512), Ranks())
    original = ShardSet.open(prepared.shards).manifest
    assert manifest["per_language"]["sw"] == original["per_language"]["sw"]  # sequences, tokens and target tokens


@pytest.mark.parametrize("kind", KINDS)
def test_derive_refuses_pivot_that_no_record_has(kind: str, prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{prepared.data}: no record in the language EN; give .* as --pivot"):
        derive(kind, [prepared.data], tmp_path / "y.jsonl", "EN")
    assert not list(tmp_path.iterdir())


def test_shuffled_pairs_refuse_single_translation(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(
            json.dumps({"pair_id": "1", "lang": lang, "question": "?", "answer": "!"}) + "\n" for lang in ["en", "sw"]
        )
    )
    with pytest.raises(UserError, match=r"x\.jsonl: a single translation in sw; shuffling pairs takes two or more"):
        derive("shuffled_pairs", [path], tmp_path / "y.jsonl")
    assert not list(tmp_path.glob("y*"))


def test_question_translation_adds_tasks_from_pairs(tmp_path: Path) -> None:
    records = [
        {"pair_id": "7", "lang": "en", "question": "How many?", "answer": "It is 3.", "gold": "3"},
        {"pair_id": "7", "lang": "sw", "question": "Mangapi?", "answer": "Ni 3.", "gold": "3"},
        {"pair_id": "7", "lang": "xx", "messages": [
            {"role": "system", "content": "S"}, {"role": "user", "content": "Q?"},
            {"role": "assistant", "content": "A."}]},
        {"pair_id": "8", "lang": "en", "question": "Why?", "answer": "So."},
    ]  # fmt: skip
    source, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert derive("question_translation", [source], output) == {"written": 6, "changed": 2}
    added = [record for record in read(output) if "#" in record["pair_id"]]
    assert added == [
        {"pair_id": "7#translate-sw", "lang": "en", "answer": "How many?",
         "question": "Translate this question from Swahili into English.\n\nMangapi?"},
        {"pair_id": "7#translate-xx", "lang": "en", "answer": "How many?",
         "question": "Translate this question from xx into English.\n\nQ?"},
    ]  # fmt: skip
    kept = [record for record in read(output) if "#" not in record["pair_id"]]
    assert [(r["pair_id"], r["lang"], response(r), r.get("gold")) for r in kept] == [
        (r["pair_id"], r["lang"], response(r), r.get("gold")) for r in records
    ]


def test_question_translations_are_packed_without_pairs(prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "added.jsonl"
    counts = derive("question_translation", [prepared.data], output)
    pack([output], str(prepared.tokenizer), tmp_path / "shards", PackSettings(max_seq_length=512), Ranks())
    shards = ShardSet.open(tmp_path / "shards")
    sequences = [item for row in shards for item in zip(row.pair_id, row.lang, row.role, strict=True)]
    tasks = [item for item in sequences if "#translate-" in item[0]]
    assert len(tasks) == counts["changed"] and {item[1:] for item in tasks} == {("en", "pivot")}
    translations = sum(item[2] == "translation" for item in sequences)
    assert translations == counts["changed"]  # each translation gives one task

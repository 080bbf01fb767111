"""Packing is complete, reproducible, restartable, and the same on any number of ranks."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data_prep.packing import packer
from data_prep.packing.settings import PackSettings
from data_prep.readers import split_inputs
from data_prep.shards.format import COPIES, IGNORE, SCHEMA, ShardSet
from data_prep.shards.verification import verify
from data_prep.tokenization.tokenizer import load_packed_tokenizer, load_tokenizer
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from tests.data_prep.packing.helpers import EN, FR, SMALL, STEPS, contents, run, write_records


def test_pack_keeps_every_record_and_its_tokens(demo_file, tokenizer_dir, tmp_path):
    manifest = run([demo_file], tokenizer_dir, tmp_path / "out")
    shards = verify(tmp_path / "out", str(tokenizer_dir))
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = {}
    for line in demo_file.read_text("utf-8").splitlines():
        record = json.loads(line)
        chat = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        labels = [i if m else IGNORE for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)]
        expected[record["pair_id"], record["lang"]] = (encoded["input_ids"], labels)
    actual = {}
    for row in shards:
        ends = np.cumsum(row.seq_lens).tolist()
        for start, end, pair_id, lang in zip([0, *ends], ends, row.pair_id, row.lang, strict=False):
            assert (pair_id, lang) not in actual
            actual[pair_id, lang] = (row.input_ids[start:end].tolist(), row.labels[start:end].tolist())
    assert actual == expected
    assert manifest["totals"]["sequences"] == len(expected) and manifest["languages"] == ["en", "fr", "sw", "zh"]
    assert [shard["rows"] for shard in manifest["shards"][:-1]] == [8] * (len(manifest["shards"]) - 1)
    per_language = Counter(lang for _, lang in expected)
    assert {lang: counts["sequences"] for lang, counts in manifest["per_language"].items()} == per_language
    assert all(table.column_names == SCHEMA.names for table in shards.read_columns([*SCHEMA.names, COPIES.name]))


def test_pack_ignores_order_of_records_and_files(demo_file, tokenizer_dir, tmp_path):
    lines = demo_file.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[::-2]), "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(lines[-2::-2]), "utf-8")
    settings = PackSettings(max_seq_length=512, rows_per_shard=8)
    run([demo_file], tokenizer_dir, tmp_path / "one", settings)
    run([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "two", settings)
    for shard in (tmp_path / "one").glob("shard-*"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_pack_orders_rows_by_seed(demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "one")
    run([demo_file], tokenizer_dir, tmp_path / "two", PackSettings(1024, seed=1, rows_per_shard=8, window_bytes=20_000))
    assert ShardSet.open(tmp_path / "one")[0].pair_id != ShardSet.open(tmp_path / "two")[0].pair_id


def test_pack_rerun_rejects_other_settings_and_input(demo_file, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    first = run([demo_file], tokenizer_dir, out)
    before = contents(out)
    (tmp_path / "out.partial").mkdir()  # as if interrupted after the output existed
    (tmp_path / "out.partial" / "settings.json").write_text("{}")
    assert run([demo_file], tokenizer_dir, out) == first
    with pytest.raises(UserError, match="different `max_seq_length`"):
        run([demo_file], tokenizer_dir, out, PackSettings(max_seq_length=256))
    other = tmp_path / demo_file.name
    other.write_bytes(demo_file.read_bytes().replace(b"apples", b"plums!"))
    with pytest.raises(UserError, match="a different `sources`"):
        run([other], tokenizer_dir, out)
    assert contents(out) == before and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("step", STEPS)
def test_pack_resumes_unfinished_parts(step, demo_file, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(packer, "split_inputs", lambda paths: split_inputs(paths, 10_000))
    run([demo_file], tokenizer_dir, tmp_path / "whole")
    original = getattr(packer, step)
    calls: list[object] = []

    def interrupt_second_call(*args):
        calls.append(args[1] if step == "tokenize_split" else args[0])  # the part
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(packer, step, interrupt_second_call)
    with pytest.raises(KeyboardInterrupt):
        run([demo_file], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run([demo_file], tokenizer_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert calls.count(calls[0]) == 1 and calls.count(calls[1]) == 2  # the finished part is not repeated


def test_pack_discards_unfinished_work_of_other_settings(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    original = packer.write_shard
    monkeypatch.setattr(packer, "write_shard", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run([demo_file], tokenizer_dir, tmp_path / "out")
    monkeypatch.setattr(packer, "write_shard", original)
    other = PackSettings(max_seq_length=512, seed=5)
    run([demo_file], tokenizer_dir, tmp_path / "out", other)
    run([demo_file], tokenizer_dir, tmp_path / "clean", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_pack_splits_long_groups_and_drops_long_pairs(tokenizer_dir, tmp_path):
    word = "7"  # one token each
    source = write_records(
        tmp_path / "a.jsonl",
        ("p", "en", "q", word * 30),
        ("p", "fr", "q", word * 25),
        ("p", "sw", "q", word * 20),
        ("p", "zh", "q", word * 300),
        ("q", "en", "q", word * 300),
        ("q", "fr", "q", "short"),
    )
    length = 80  # fits the pivot and one translation
    manifest = run([source], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=length))
    verify(tmp_path / "out")
    rows = [(row.pair_id, row.lang, row.copies.tolist()) for row in ShardSet.open(tmp_path / "out")]
    assert sorted(rows) == [(["p", "p"], ["en", "fr"], [2, 1]), (["p", "p"], ["en", "sw"], [2, 1])]
    assert manifest["drops"] == {"too_long": {"zh": 1, "en": 1, "fr": 1}}


def test_pack_truncates_long_pairs(tokenizer_dir, tmp_path):
    source = write_records(tmp_path / "a.jsonl", ("p", "en", "q", "7" * 90), ("p", "fr", "q", "7" * 90))
    manifest = run([source], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=100, truncate=True))
    (row,) = verify(tmp_path / "out")
    assert row.lang == ["en", "fr"] and len(row.input_ids) == 100
    assert manifest["drops"] == {"truncated": {"en": 1, "fr": 1}}


def test_pack_limits_sequences_per_row(demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=2048, max_sequences_per_row=3))
    rows = list(verify(tmp_path / "out"))
    assert max(len(row.seq_lens) for row in rows) == 3
    assert sum("sw" in row.lang for row in rows) == 10


def test_pack_pairs_repeats_the_pivot(demo_file, tokenizer_dir, tmp_path):
    settings = PackSettings(max_seq_length=2048, translations_per_row=1, pairs_only=True)
    run([demo_file], tokenizer_dir, tmp_path / "out", settings)
    rows = list(verify(tmp_path / "out"))
    for row in rows:
        assert row.role == ["pivot", "translation"] * (len(row.role) // 2)
        assert len(set(row.pair_id)) == len(row.pair_id) // 2
    copies = [n for row in rows for n, role in zip(row.copies.tolist(), row.role, strict=True) if role == "pivot"]
    assert max(copies) > 1 and sum(1 / n for n in copies) == pytest.approx(len({i for r in rows for i in r.pair_id}))


def test_pack_rerun_accepts_manifest_without_newer_settings(tokenizer_dir, tmp_path):
    source = write_records(tmp_path / "a.jsonl", EN, FR)
    manifest = run([source], tokenizer_dir, tmp_path / "out")
    older = {key: value for key, value in manifest.items() if key not in ("translations_per_row", "pairs_only")}
    write_json(tmp_path / "out" / "manifest.json", older)
    assert run([source], tokenizer_dir, tmp_path / "out") == older
    with pytest.raises(UserError, match="different `pairs_only`"):
        run([source], tokenizer_dir, tmp_path / "out", replace(SMALL, pairs_only=True))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([FR], r"a.jsonl row 1: pair_id p has no en record, only fr"),
        ([EN, FR, FR], r"a.jsonl row 3: pair_id p has the language fr twice \(first in .*a.jsonl row 2\)"),
        ([EN, ("p", "fr", "q", " \n")], r"a.jsonl row 2: empty response"),
        ([EN, ("p", "", "q", "a")], r"a.jsonl row 2: no `lang`"),
        ([EN, ("p", "fr", "\ud800", "a")], r"a.jsonl row 2: the `content` of a 'user' message has a lone surrogate"),
        ([("p", "en", "q", "long " * 999), FR], "nothing is left to pack"),
        ([EN, FR, ("r", "en", "q", "a"), ("r", "FR", "q", "a")], r"--input: the languages FR and fr are two spellings"),
    ],
)
def test_pack_names_bad_records_and_leaves_no_files(records, message, tokenizer_dir, tmp_path):
    source = write_records(tmp_path / "a.jsonl", *records)
    with pytest.raises(UserError, match=message):
        run([source], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=64))
    assert list(tmp_path.iterdir()) == [source]


def test_pack_rejects_colliding_pair_ids_and_golds(tokenizer_dir, tmp_path):
    first = write_records(tmp_path / "a.jsonl", EN, ("p", "sw", "q", "a"))
    second = write_records(tmp_path / "b.jsonl", ("p", "en", "other", "b"), FR)
    with pytest.raises(UserError, match=r"b.jsonl row 1: .* en twice \(first in .*a.jsonl row 1\); .*unique"):
        run([first, second], tokenizer_dir, tmp_path / "out")
    golds = {"en": "8", "fr": 8.0, "de": "acht", "sw": "8.5", "th": None}
    records = [{"pair_id": "p", "lang": lang, "question": "q", "answer": "a", "gold": golds[lang]} for lang in golds]
    for record in records:
        (tmp_path / f"{record['lang']}.jsonl").write_text(json.dumps(record))
    files = {lang: tmp_path / f"{lang}.jsonl" for lang in golds}
    with pytest.raises(UserError, match=r"sw.jsonl row 1: pair_id p has the gold 8.5, but 8 in .*en.jsonl row 1;"):
        run([*files.values()], tokenizer_dir, tmp_path / "out")
    del files["sw"]
    assert run([*files.values()], tokenizer_dir, tmp_path / "out")["totals"]["pairs"] == 3


def test_pack_skips_and_counts_bad_records(tokenizer_dir, tmp_path, capsys):
    source = write_records(
        tmp_path / "a.jsonl",
        EN,
        FR,
        ("p", "fr", "q", "again"),
        ("p", "sw", "q", "a </s> b"),
        ("q", "en", "q", ""),
        ("q", "fr", "q", "a"),
    )
    with open(source, "a") as file:
        file.write('{"pair_id": \n')
        for lang, gold in (("en", "1"), ("fr", "2")):
            file.write(json.dumps({"pair_id": "r", "lang": lang, "question": "q", "answer": "a", "gold": gold}) + "\n")
    with pytest.raises(UserError, match=r"row 4 \(pair_id p, sw\): the text contains the special token </s>"):
        run([write_records(tmp_path / "b.jsonl", EN, EN, EN, ("p", "sw", "q", "</s>"))], tokenizer_dir, tmp_path / "b")
    manifest = run([source], tokenizer_dir, tmp_path / "out", PackSettings(on_bad_record="skip"))
    verify(tmp_path / "out")
    assert manifest["drops"] == {
        "bad_record": {"sw": 1, "en": 1, "?": 1},
        "language_twice": {"fr": 1},
        "no_pivot": {"fr": 1},
        "gold_differs": {"fr": 1},
    }
    assert manifest["languages"] == ["en", "fr", "sw"] and manifest["totals"]["sequences"] == 3
    assert f"skipped: {source} row 5: empty response" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"nothing is left to pack: bad_record 1"):
        lone = write_records(tmp_path / "c.jsonl", ("p", "sw", "q", "</s>"))
        run([lone], tokenizer_dir, tmp_path / "c", PackSettings(on_bad_record="skip"))


def test_pack_records_template_and_variables(tokenizer_dir, tmp_path, capsys):
    """The shards' tokenizer is found again by the manifest, and a saved copy carries the template."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' + greeting }}{% endif %}{# {{ strftime_now('%Y') }} #}"
    )
    source = write_records(tmp_path / "a.jsonl", EN, FR)
    misspelled = PackSettings(chat_template=template, chat_template_kwargs={"greting": "Hello"})
    with pytest.raises(UserError, match=r"has no variable 'greting'; its variables are: eos_token, greeting$"):
        run([source], tokenizer_dir, tmp_path / "out", misspelled)
    settings = PackSettings(chat_template=template, chat_template_kwargs={"greeting": "Hello"})
    manifest = run([source], tokenizer_dir, tmp_path / "out", settings)
    assert "warning" in capsys.readouterr().err  # the responses do not begin with the greeting
    assert (manifest["chat_template_date"], manifest["chat_template_kwargs"]) == ("2024-07-26", {"greeting": "Hello"})
    tokenizer = load_packed_tokenizer(str(tokenizer_dir), tmp_path / "out", manifest)
    tokenizer.save_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "q"}]
    prompt = load_tokenizer(tmp_path / "model").apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>q</s><|assistant|>Hello"
    load_packed_tokenizer(tmp_path / "model", tmp_path / "out", manifest)
    for change in ({"greeting": "Hi"}, {}):
        with pytest.raises(UserError, match=r"a chat template that differs from that of .*tok; pack again"):
            load_packed_tokenizer(tokenizer_dir, tmp_path / "out", {**manifest, "chat_template_kwargs": change})


def test_pack_rejects_concurrent_run_on_same_output(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    original, calls = packer.write_row_plan, []

    def run_again(*args):
        with pytest.raises(UserError, match="another run is packing in this folder"):
            run([demo_file], tokenizer_dir, tmp_path / "out")
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(packer, "write_row_plan", run_again)
    run([demo_file], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")
    assert calls

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.packing import packer as pack_module
from data_prep.packing.packer import PackSettings, pack
from data_prep.ranks import Ranks
from data_prep.shards.format import IGNORE, ShardSet, shard_name
from data_prep.shards.verification import verify
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL

SMALL = PackSettings(max_seq_length=1024, rows_per_shard=8, window_bytes=20_000)


def run(inputs, tokenizer_dir, output, settings=SMALL):
    return pack(inputs, str(tokenizer_dir), output, settings, Ranks())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))}


def write_records(path: Path, *records: tuple[str, str, str, str]) -> Path:
    keys = ("pair_id", "lang", "question", "answer")
    path.write_text("".join(json.dumps(dict(zip(keys, record, strict=True))) + "\n" for record in records))
    return path


def test_every_record_is_packed_once_with_its_own_tokens(demo_file, tokenizer_dir, tmp_path):
    manifest = run([demo_file], tokenizer_dir, tmp_path / "out")
    shards = verify(tmp_path / "out", str(tokenizer_dir))
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = {}
    for line in demo_file.read_text("utf-8").splitlines():
        record = json.loads(line)
        chat = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
        own = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        labels = [i if m else IGNORE for i, m in zip(own["input_ids"], own["assistant_masks"], strict=True)]
        expected[record["pair_id"], record["lang"]] = (own["input_ids"], labels)
    found = {}
    for row in shards:
        ends = np.cumsum(row.seq_lens).tolist()
        for start, end, pair_id, lang in zip([0, *ends], ends, row.pair_id, row.lang, strict=False):
            assert (pair_id, lang) not in found
            found[pair_id, lang] = (row.input_ids[start:end].tolist(), row.labels[start:end].tolist())
    assert found == expected
    assert manifest["totals"]["sequences"] == len(expected) and manifest["languages"] == ["en", "fr", "sw", "zh"]
    assert [shard["rows"] for shard in manifest["shards"][:-1]] == [8] * (len(manifest["shards"]) - 1)
    per_language = Counter(lang for _, lang in expected)
    assert {lang: counts["sequences"] for lang, counts in manifest["per_language"].items()} == per_language


def test_order_of_records_and_files_does_not_matter(demo_file, tokenizer_dir, tmp_path):
    lines = demo_file.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[::-2]), "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(lines[-2::-2]), "utf-8")
    settings = PackSettings(max_seq_length=512, rows_per_shard=8)
    run([demo_file], tokenizer_dir, tmp_path / "one", settings)
    run([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "two", settings)
    for shard in (tmp_path / "one").glob("shard-*"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_the_seed_changes_the_order(demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "one")
    run([demo_file], tokenizer_dir, tmp_path / "two", PackSettings(1024, seed=1, rows_per_shard=8, window_bytes=20_000))
    assert ShardSet.open(tmp_path / "one")[0].pair_id != ShardSet.open(tmp_path / "two")[0].pair_id


def test_a_rerun_is_done_and_other_settings_or_input_are_refused(demo_file, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    first = run([demo_file], tokenizer_dir, out)
    before = contents(out)
    (tmp_path / "out.partial").mkdir()  # ended after the output was there
    (tmp_path / "out.partial" / "settings.json").write_text("{}")
    assert run([demo_file], tokenizer_dir, out) == first
    with pytest.raises(UserError, match="another `max_seq_length`"):
        run([demo_file], tokenizer_dir, out, PackSettings(max_seq_length=256))
    other = tmp_path / demo_file.name
    other.write_bytes(demo_file.read_bytes().replace(b"apples", b"plums!"))
    with pytest.raises(UserError, match="another `sources`"):
        run([other], tokenizer_dir, out)
    assert contents(out) == before and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("step", ["tokenize_piece", "write_plan", "write_shard"])
def test_interrupted_anywhere_it_goes_on_with_what_is_missing(step, demo_file, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "plan_pieces", lambda paths: plan_pieces(paths, 10_000))
    from data_prep.records import plan_pieces

    run([demo_file], tokenizer_dir, tmp_path / "whole")
    real = getattr(pack_module, step)
    calls: list[object] = []

    def dying(*args):
        calls.append(args[1] if step == "tokenize_piece" else args[0])  # which part
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pack_module, step, dying)
    with pytest.raises(KeyboardInterrupt):
        run([demo_file], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run([demo_file], tokenizer_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert calls.count(calls[0]) == 1 and calls.count(calls[1]) == 2  # the finished part once, the other again


def test_unfinished_work_of_other_settings_is_not_used(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    real = pack_module.write_shard
    monkeypatch.setattr(pack_module, "write_shard", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run([demo_file], tokenizer_dir, tmp_path / "out")
    monkeypatch.setattr(pack_module, "write_shard", real)
    other = PackSettings(max_seq_length=512, seed=5)
    run([demo_file], tokenizer_dir, tmp_path / "out", other)
    run([demo_file], tokenizer_dir, tmp_path / "clean", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_overlong_groups_are_split_then_pairs_dropped_and_counted(tokenizer_dir, tmp_path):
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
    length = 80  # holds the pivot with one of the others
    manifest = run([source], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=length))
    verify(tmp_path / "out")
    groups = [(row.pair_id, row.lang) for row in ShardSet.open(tmp_path / "out")]
    assert sorted(groups) == [(["p", "p"], ["en", "fr"]), (["p", "p"], ["en", "sw"])]
    assert manifest["drops"] == {"too_long": {"zh": 1, "en": 1, "fr": 1}}


def test_truncation_keeps_pairs_that_fit_no_row(tokenizer_dir, tmp_path):
    source = write_records(tmp_path / "a.jsonl", ("p", "en", "q", "7" * 90), ("p", "fr", "q", "7" * 90))
    manifest = run([source], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=100, truncate=True))
    (row,) = verify(tmp_path / "out")
    assert row.lang == ["en", "fr"] and len(row.input_ids) == 100
    assert manifest["drops"] == {"truncated": {"en": 1, "fr": 1}}


def test_at_most_so_many_sequences_in_a_row(demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=2048, max_sequences_per_row=3))
    rows = list(verify(tmp_path / "out"))
    assert max(len(row.seq_lens) for row in rows) == 3
    assert sum("sw" in row.lang for row in rows) == 10


EN, FR = ("p", "en", "q", "a"), ("p", "fr", "q", "a")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([FR], r"a.jsonl row 1: pair_id p has no en record, only fr"),
        ([EN, FR, FR], r"a.jsonl row 3: pair_id p has the language fr twice \(first in .*a.jsonl row 2\)"),
        ([EN, ("p", "fr", "q", " \n")], r"a.jsonl row 2: empty response"),
        ([EN, ("p", "", "q", "a")], r"a.jsonl row 2: no `lang`"),
        ([EN, ("p", "fr", "\ud800", "a")], r"a.jsonl row 2 \(pair_id p, fr\): .*Unicode"),
        ([("p", "en", "q", "long " * 999), FR], "nothing is left to pack"),
    ],
)
def test_bad_records_are_named_and_nothing_is_left_behind(records, message, tokenizer_dir, tmp_path):
    source = write_records(tmp_path / "a.jsonl", *records)
    with pytest.raises(UserError, match=message):
        run([source], tokenizer_dir, tmp_path / "out", PackSettings(max_seq_length=64))
    assert list(tmp_path.iterdir()) == [source]


def test_two_runs_do_not_pack_into_one_output(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    real, seen = pack_module.write_plan, []

    def meanwhile(*args):
        with pytest.raises(UserError, match="another run is packing there"):
            run([demo_file], tokenizer_dir, tmp_path / "out")
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(pack_module, "write_plan", meanwhile)
    run([demo_file], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")
    assert seen


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x"), OSError("disk full, says arrow")])
@pytest.mark.parametrize("step", ["tokenize_piece", "write_plan", "write_shard"])
def test_a_full_disk_is_one_line_and_the_work_is_kept(step, error, demo_file, tokenizer_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, step, lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match=r"(x: No space left|disk full, says arrow).*; mend it and run again"):
            run([demo_file], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    run([demo_file], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_output_that_cannot_be_written_or_is_not_ours(demo_file, tokenizer_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        run([demo_file], tokenizer_dir, tmp_path / "file" / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not a shard directory"):
        run([demo_file], tokenizer_dir, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"notes.txt": b"x"}


def test_verify_finds_what_hashes_do_not(demo_file, tokenizer_dir, tmp_path):
    manifest = run([demo_file], tokenizer_dir, tmp_path / "out")
    manifest["max_seq_length"] = 100
    write_json(tmp_path / "out" / "manifest.json", manifest)
    with pytest.raises(UserError, match=f"{shard_name(0)} row 1: .* more than max_seq_length"):
        verify(tmp_path / "out")


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n"]


def command(*arguments: object, ranks: int = 0) -> subprocess.CompletedProcess:
    line = [*([*MPIRUN, str(ranks)] if ranks else []), sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": PATH})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_same_bytes_for_any_number_of_ranks(ranks, demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "alone")
    settings = ["--max_seq_length", 1024, "--rows_per_shard", 8, "--window_bytes", 20_000]
    out = tmp_path / "together"
    done = command("pack", "--input", demo_file, "--tokenizer", tokenizer_dir, "--output", out, *settings, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.slow
def test_a_failing_rank_ends_all_with_its_message(tokenizer_dir, tmp_path):
    good = write_records(tmp_path / "good.jsonl", EN)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    inputs = ["--input", good, bad]
    done = command("pack", *inputs, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", ranks=2)
    assert done.returncode == 2
    assert f"error: rank 1: {bad} row 1: malformed JSON" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tasks_that_mpi_does_not_connect_are_refused(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    done = command("pack", "--input", demo_file, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    assert done.returncode == 2 and "2 processes were launched, but MPI sees one" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_all_ranks_see_is_said_once(tokenizer_dir, tmp_path):
    long = write_records(tmp_path / "long.jsonl", ("p", "en", "q", "7" * 99), ("p", "fr", "q", "7"))
    inputs = ["--input", long, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--max_seq_length", 9]
    done = command("pack", *inputs, ranks=2)
    assert done.returncode == 2 and done.stderr.count("nothing is left to pack") == 1
    done = command("pack", "--input", "none.jsonl", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", ranks=2)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "error: none.jsonl: no such file" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "launcher", "status"),
    [
        (signal.SIGKILL, [], -signal.SIGKILL),
        (signal.SIGTERM, [], STOPPED_BY_SIGNAL),
        (signal.SIGUSR1, [*MPIRUN, "2"], STOPPED_BY_SIGNAL),
    ],
    ids=["KILL", "TERM", "USR1 through mpirun"],
)
def test_ended_and_started_again_gives_the_same_bytes(number, launcher, status, demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "whole")
    words = ["pack", "--input", demo_file, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"]
    words += ["--max_seq_length", 1024, "--rows_per_shard", 8, "--window_bytes", 20_000]
    line = [*launcher, sys.executable, "-m", "data_prep", *map(str, words)]
    environment = {**os.environ, "PATH": PATH}
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    while process.poll() is None and not list(tmp_path.glob("out.partial/settings.json")):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    assert command(*words).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

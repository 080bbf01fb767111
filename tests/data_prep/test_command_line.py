"""The commands of `python -m data_prep`, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_commands_prepare_demo_data(tmp_path):
    train, tok, out = tmp_path / "train.jsonl", tmp_path / "tok", tmp_path / "shards"
    steps = [
        ("demo", "--output", train, "--languages", "en", "sw", "--low_resource", "sw", "--train_problems", 40),
        ("tokenizer", "--input", train, "--output", tok, "--vocab_size", 400),
        ("pack", "--input", train, "--tokenizer", tok, "--output", out, "--max_seq_length", 512),
        ("verify", out, "--tokenizer", tok),
        ("inspect", out, "--tokenizer", tok, "--row", 0),
        ("stats", out),
    ]
    steps[0] += ("--low_resource_problems", 5)
    for step in steps:
        result = run(*step)
        assert result.returncode == 0, result.stderr
        if step[0] == "inspect":
            assert "⟦<s><|user|>" in result.stdout and "The answer is" in result.stdout.split("⟧")[1]
        if step[0] in ("pack", "verify", "stats"):
            assert "repeated pivots: none" in result.stdout
        if step[0] == "pack":
            assert "packing efficiency" in result.stdout and "supervised" in result.stdout
    assert (tmp_path / "train.test.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "--input", "none.jsonl", "--tokenizer", "/none", "--output", "out"), "none.jsonl: no such file"),
        (("pack", "--input", "empty.jsonl", "--tokenizer", "/none", "--output", "out"), "empty.jsonl: empty file"),
        (("pack", "--input", "bad.parquet", "--tokenizer", "/none", "--output", "out"), "not a Parquet file"),
        (("verify", "none"), "none: no such shard directory"),
        (("verify", "bad.jsonl"), "bad.jsonl: a file, not a shard directory; name a directory"),
        (("inspect", ".", "--tokenizer", "/none"), "not a shard directory"),
        (("tokenizer", "--input", "bad.jsonl", "--output", "tok"), "bad.jsonl row 1: malformed JSON"),
        (("demo", "--output", "x", "--languages", "en", "xx"), "unknown language 'xx'"),
        (("demo", "--output", "x", "--languages", "en", "de", "de"), "--languages: de is named twice"),
        (("convert", "--format", "mcot", "--input", "none", "--output", "x"), "none: no such file"),
        (("convert", "--format", "nope", "--input", "none", "--output", "x"), "nope"),
        (("pack", "--inputs", "x"), "--input"),
        (("pack", "--chat_template_kwargs", '{"a": "\\ud800"}'), "--chat_template_kwargs: not JSON"),
    ],
)
def test_commands_report_user_errors_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"pair_id": 1,\n')
    (tmp_path / "bad.parquet").write_text("PAR1 no")
    before = sorted(tmp_path.iterdir())
    result = run(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(("error: ", "python -m data_prep"))
    assert sorted(tmp_path.iterdir()) == before

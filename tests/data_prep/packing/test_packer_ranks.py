"""Packing on several MPI ranks, and its interruption by signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from tests.data_prep.packing.helpers import EN, contents, run, write_records

PATH = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n"]


def command(*arguments: object, ranks: int = 0) -> subprocess.CompletedProcess:
    """Run `python -m data_prep`, on MPI ranks unless `ranks` is 0."""
    launcher = [*MPIRUN, str(ranks)] if ranks else []
    line = [*launcher, sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": PATH})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_pack_is_identical_on_any_number_of_ranks(ranks, demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "alone")
    settings = ["--max_seq_length", 1024, "--rows_per_shard", 8, "--window_bytes", 20_000]
    out = tmp_path / "together"
    result = command(
        "pack", "--input", demo_file, "--tokenizer", tokenizer_dir, "--output", out, *settings, ranks=ranks
    )
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.slow
def test_pack_failing_rank_stops_all_ranks(tokenizer_dir, tmp_path):
    good = write_records(tmp_path / "good.jsonl", EN)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    inputs = ["--input", good, bad]
    result = command("pack", *inputs, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", ranks=2)
    assert result.returncode == 2
    assert f"error: rank 1: {bad} row 1: malformed JSON" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pack_rejects_tasks_not_connected_by_mpi(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    result = command("pack", "--input", demo_file, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    assert result.returncode == 2 and "2 processes were launched, but MPI sees one" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pack_prints_common_error_once(tokenizer_dir, tmp_path):
    long = write_records(tmp_path / "long.jsonl", ("p", "en", "q", "7" * 99), ("p", "fr", "q", "7"))
    inputs = ["--input", long, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--max_seq_length", 9]
    result = command("pack", *inputs, ranks=2)
    assert result.returncode == 2 and result.stderr.count("nothing is left to pack") == 1
    result = command(
        "pack", "--input", "none.jsonl", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", ranks=2
    )
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert "error: none.jsonl: no such file" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "launcher", "status"),
    [
        (signal.SIGKILL, [], -signal.SIGKILL),
        (signal.SIGTERM, [], STOPPED_BY_SIGNAL),
        (signal.SIGUSR1, [*MPIRUN, "2"], STOPPED_BY_SIGNAL),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGUSR1_mpirun"],
)
def test_pack_resumes_after_signal(signal_number, launcher, status, demo_file, tokenizer_dir, tmp_path):
    run([demo_file], tokenizer_dir, tmp_path / "whole")
    args = ["pack", "--input", demo_file, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"]
    args += ["--max_seq_length", 1024, "--rows_per_shard", 8, "--window_bytes", 20_000]
    line = [*launcher, sys.executable, "-m", "data_prep", *map(str, args)]
    environment = {**os.environ, "PATH": PATH}
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    while process.poll() is None and not list(tmp_path.glob("out.partial/settings.json")):
        time.sleep(0.002)
    process.send_signal(signal_number)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    assert command(*args).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

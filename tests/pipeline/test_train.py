"""The command line of the trainer: help, dry run, and every mistake that a user can make."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from data_prep.shards.format import ShardSet
from pipeline.common import distributed
from pipeline.common.exit_codes import LOSS_FAILURE, STOPPED_BY_SIGNAL
from pipeline.config.settings import Config
from pipeline.fault_tolerance.guard import Guard
from pipeline.fault_tolerance.restarts import read_restart_log
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.status import status
from pipeline.train import finish_run
from pipeline.training.loop import RunEnd
from tests.conftest import Prepared
from tests.runs import ENVIRONMENT, TINY, python, refuses, train, write_recipe


def recipe_for(prepared: Prepared, tmp_path: Path, **changes: object) -> Path:
    return write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes)


def test_train_dry_run(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path)
    result = python("pipeline/train.py", "--config", recipe, "--dry_run")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((prepared.shards / "manifest.json").read_text())
    rows = sum(shard["rows"] for shard in manifest["shards"])
    per_step = round(sum(shard["tokens"] for shard in manifest["shards"]) * 4 / rows)
    d, i, v = TINY["hidden_size"], TINY["intermediate_size"], 600
    layer = (d * d + d) + 2 * (d * d // 2 + d // 2) + d * d + 3 * d * i + 2 * d
    for text in (f"{v * d + 2 * layer + d:,} parameters", f"{v * d:,}", f"{per_step:,}", "GiB", "pairs per step"):
        assert text in result.stdout, (text, result.stdout)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_train_help_explains_every_setting() -> None:
    result = python("pipeline/train.py", "--help")
    assert result.returncode == 0, result.stderr
    assert set(known_keys()) <= set(re.findall(r"^  --([a-z_.0-9]+)", result.stdout, re.MULTILINE))
    for part in (
        "default: 1e-05) (greater than 0 and finite, on resume: may change)",
        "peak learning rate of AdamW",
        "--loss.alignment_weight",
        "--dry_run",
    ):
        assert part in " ".join(result.stdout.split())


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all settings; each must have an explanation in its class's docstring."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from known_keys(field.default_factory, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            assert f"\n        {field.name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{field.name} is not explained"
            yield prefix + field.name


def test_train_refuses_missing_shards(tmp_path: Path) -> None:
    command = ["pipeline/train.py", "--output_dir", tmp_path, "--data.shards"]
    missing = tmp_path / "none"
    refuses(python(*command, missing), "no shards", f"python -m data_prep pack --output {missing}")
    with mock.patch.dict(ENVIRONMENT, {"SLURM_JOB_ID": "7"}):
        refuses(python(*command, missing), "no shards", f"SHARDS={missing} sbatch slurm/prepare.sh")


def test_train_refuses_other_tokenizer(prepared: Prepared, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    result = python("-m", "data_prep", "tokenizer", "--input", prepared.data, "--output", other, "--vocab_size", 580)
    assert result.returncode == 0, result.stderr
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, other)
    refuses(python("pipeline/train.py", "--config", recipe), "packed with a tokenizer that differs", "pack again")


def test_train_refuses_corrupted_shard(prepared: Prepared, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(prepared.shards, shards)
    file = shards / "shard-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    recipe = write_recipe(tmp_path / "run.yaml", shards, prepared.tokenizer)
    refuses(python("pipeline/train.py", "--config", recipe, "--dry_run"), "shard-00000.parquet", "corrupted")
    # Only rank 0 reads all shards. It must not leave the other ranks waiting for a connection.
    output = train(2, "--config", recipe, expect=2, timeout=100)
    assert output.count("error: ") == 1 and "corrupted" in output and "Traceback" not in output
    assert not (tmp_path / "run" / "starts.jsonl").exists()


def test_train_refuses_unknown_key_and_rank_count(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path)
    refuses(python("pipeline/train.py", "--config", recipe, "--training.max_step", 3), "max_step", "max_steps")
    recipe = recipe_for(prepared, tmp_path, model__vocab_multiple=7, training__train_batch_size=6)
    with mock.patch.dict(ENVIRONMENT, rank_0_of(4)):
        refuses(python("pipeline/train.py", "--config", recipe), "not divisible by 4 ranks", "vocab_multiple")
    with mock.patch.dict(ENVIRONMENT, rank_0_of(7)):
        refuses(python("pipeline/train.py", "--config", recipe), "train_batch_size 6", "7 ranks")


def rank_0_of(world_size: int, port: int = 29500) -> dict[str, str]:
    """Return the variables that a launcher sets on rank 0."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    return variables | {"MASTER_PORT": str(port)}


def test_train_names_port_in_use(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path)
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        port = other_run.getsockname()[1]
        with mock.patch.dict(ENVIRONMENT, rank_0_of(2, port)):
            refuses(python("pipeline/train.py", "--config", recipe), f"port {port}", "in use", "--master_port")


def test_train_refuses_number_out_of_range_in_dry_run(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path)
    result = python("pipeline/train.py", "--config", recipe, "--dry_run", "--training.weight_decay=-0.1")
    refuses(result, "training.weight_decay is -0.1", "at least 0")


def test_train_refuses_unknown_language(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path, data__language_weights={"sw": 2.0, "xx": 2.0})
    refuses(python("pipeline/train.py", "--config", recipe), "data.language_weights", "'xx'", "sw")


def test_train_refuses_sequences_longer_than_positions(prepared: Prepared, tmp_path: Path) -> None:
    """The rows of 512 tokens may be longer than the positions, because positions restart in every sequence."""
    longest = max(int(row.seq_lens.max()) for row in ShardSet.open(prepared.shards))
    assert longest < 500
    for positions, refused in ((longest, False), (longest - 1, True)):
        config = {**TINY, "max_position_embeddings": positions}
        recipe = recipe_for(prepared, tmp_path, model__config=config)
        result = python("pipeline/train.py", "--config", recipe, "--dry_run")
        if refused:
            refuses(result, f"its longest sequence has {longest} tokens", f"--max_seq_length {positions}")
        else:
            assert result.returncode == 0, result.stderr


def test_train_refuses_alignment_without_pairs(prepared: Prepared, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(prepared.shards, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["totals"]["pairs"] = 0
    (shards / "manifest.json").write_text(json.dumps(manifest))
    command = ["pipeline/train.py", "--config", write_recipe(tmp_path / "run.yaml", shards, prepared.tokenizer)]
    refuses(python(*command, "--dry_run"), "has no translations of pivots", "set loss.alignment_weight to 0")
    assert python(*command, "--dry_run", "--loss.alignment_weight", 0).returncode == 0


def test_train_refuses_fp16_on_cpu(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path)
    refuses(python("pipeline/train.py", "--config", recipe, "--training.precision", "fp16"), "'fp16' needs a GPU")


def test_train_refuses_unwritable_output_dir(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    recipe = recipe_for(prepared, tmp_path, output_dir=str(tmp_path / "file" / "run"))
    refuses(python("pipeline/train.py", "--config", recipe), "output directory", "change output_dir")


def test_finish_run_stops_export_on_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export is longer than the test. The end of the run is recorded after it only."""
    release, exports = threading.Event(), []

    def export_slowly(config: Config) -> None:
        exports.append([event["event"] for event in read_restart_log(tmp_path)])
        os.kill(os.getpid(), signal.SIGUSR1)
        release.wait(60)

    monkeypatch.setattr("pipeline.export.export_finished_run", export_slowly)
    monkeypatch.setattr(distributed, "POLL_SECONDS", 0.05)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        with Guard(tmp_path, StopSignal(), 60, time.monotonic()) as guard:
            guard.restarts.record_start(9, 9, 1)
            for _ in range(2):  # the second time, the signal came before the export
                assert finish_run(Config(), guard, RunEnd(0, 9, True)) == STOPPED_BY_SIGNAL
    finally:
        release.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert exports == [["start"]]
    end = read_restart_log(tmp_path)[-1]
    assert (end["event"], end["status"], end["stopped_early"]) == ("end", STOPPED_BY_SIGNAL, False)
    assert "stopped by SIGUSR1 before the model was exported" in capsys.readouterr().out
    assert "stopped by a signal" in status(tmp_path)[0]
    (tmp_path / "ranks" / "failed.json").write_text('{"status": 2, "message": "error: no space"}')
    assert "state        failed" in status(tmp_path)[0]


@pytest.mark.slow
def test_train_refuses_checkpoint_of_other_model(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path, training__max_steps=1)
    train(2, "--config", recipe)
    (tmp_path / "other").mkdir()
    narrow = write_recipe(
        tmp_path / "other" / "run.yaml",
        prepared.shards,
        prepared.tokenizer,
        output_dir=str(tmp_path / "run"),
        model__config={**TINY, "intermediate_size": 48},
    )
    output = train(2, "--config", narrow, expect=2)
    assert "checkpoint of a different model" in output and "Traceback" not in output


@pytest.mark.slow
def test_train_stops_on_nonfinite_loss(prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(prepared, tmp_path, training__learning_rate=1e30, training__max_grad_norm=0.0)
    output = train(2, "--config", recipe, expect=LOSS_FAILURE)
    assert output.count("error: ") == 1 and "the loss is not finite" in output and "train-0" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("checkpoint-*"))

"""ZeRO-3 runs of a tiny model on gloo ranks: after a kill, with other memory settings, and as plain fine-tuning."""

import math
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.shards.format import ShardSet
from pipeline.checkpoint import layout
from pipeline.checkpoint.resume import find_resumable
from pipeline.common.atomic_io import sha256_file
from pipeline.common.exit_codes import LOSS_FAILURE, STOPPED_BY_SIGNAL
from pipeline.config.recipe import load_config
from tests.conftest import Prepared
from tests.runs import TINY, losses, metrics, select_rows, start_ranks, train, validations, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain_run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train five steps of the test recipe on two ranks; other runs are compared with them."""
    recipe = write_recipe(tmp_path_factory.mktemp("plain") / "run.yaml", prepared.shards, prepared.tokenizer)
    train(2, "--config", recipe)
    return recipe.with_suffix("")


def test_train_with_zero_weight_is_sft(prepared: Prepared, plain_run: Path, tmp_path: Path) -> None:
    """Plain fine-tuning sees the same rows with every sequence as its own pivot, so there are no pairs."""
    zero = write_recipe(tmp_path / "zero.yaml", prepared.shards, prepared.tokenizer, loss__alignment_weight=0.0)
    train(2, "--config", zero)
    plain = write_recipe(
        tmp_path / "plain.yaml", without_pairs(prepared.shards, tmp_path / "unpaired"), prepared.tokenizer
    )
    train(2, "--config", plain)
    keys = ("ce_loss", "grad_norm")
    got, expected, other = (
        [[record[key] for key in keys] for record in metrics(path)]
        for path in (tmp_path / "zero", tmp_path / "plain", plain_run)
    )
    assert len(got) == 5 and got == expected
    assert got != other
    for key in ("align_loss", "soft_token_kept_mass", "soft_token_entropy"):
        assert all(record[key] is None for record in metrics(tmp_path / "plain"))
    for record in metrics(plain_run):
        assert 0 < record["soft_token_kept_mass"] < 1 and 0 < record["soft_token_entropy"] < math.log(20)
    # Alignment raises the cosine above plain fine-tuning on the same data, order and seed.
    assert metrics(plain_run)[-1]["align_cos"] > metrics(tmp_path / "zero")[-1]["align_cos"]


def without_pairs(shards: Path, output: Path) -> Path:
    """Copy shards, with every sequence as its own pivot."""
    import dataclasses
    import json

    from data_prep.shards.format import MANIFEST, PIVOT, write_shard
    from pipeline.common.atomic_io import write_json

    output.mkdir()
    manifest = json.loads((shards / MANIFEST).read_text())
    rows = [dataclasses.replace(row, role=[PIVOT] * len(row.role)) for row in ShardSet.open(shards)]
    manifest["shards"] = [write_shard(output / "shard-00000.parquet", rows)]
    write_json(output / MANIFEST, manifest)
    return output


def test_train_resumes_after_kill_bit_for_bit(prepared: Prepared, tmp_path: Path) -> None:
    """Measure gradient norms and validate in the interrupted run only. Neither changes anything, dropout included."""
    settings = {
        "training__max_steps": 8,
        "training__save_steps": 3,
        "loss__centring": True,
        "model__config": {**TINY, "attention_dropout": 0.1},
    }
    whole = write_recipe(tmp_path / "whole.yaml", prepared.shards, prepared.tokenizer, **settings)
    train(2, "--config", whole)

    settings |= {"training__log_gradients_steps": 2, "training__eval_steps": 2}
    settings["data__eval_shards"] = str(select_rows(prepared.shards, tmp_path / "eval", slice(3)))
    broken = write_recipe(tmp_path / "broken.yaml", prepared.shards, prepared.tokenizer, **settings)
    processes = start_ranks(2, "--config", broken)
    wait_for(tmp_path / "broken" / ".checkpoint-6.partial", processes)  # in the middle of a save
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
    left = layout.newest_checkpoint(tmp_path / "broken")
    assert left is not None
    assert f"resumed from {left}" in train(2, "--config", broken)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert [record["step"] for record in metrics(tmp_path / "broken") if "ce_grad_norm" in record] == [2, 4, 6, 8]
    assert [record["step"] for record in validations(tmp_path / "broken")] == [2, 4, 6, 8]
    events = EventAccumulator(str(tmp_path / "broken" / "tensorboard")).Reload().Scalars("eval/ce")
    assert {(event.step, round(event.value, 4)) for event in events} == {
        (record["step"], round(record["eval_ce"], 4)) for record in validations(tmp_path / "broken")
    }
    weights = [optimizer_tensors(tmp_path / name) for name in ("broken", "whole")]
    assert len(weights[0]) > 10 and all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    assert sorted(p.name for p in (tmp_path / "broken").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def optimizer_tensors(directory: Path) -> list[torch.Tensor]:
    """Return the fp32 weights and Adam moments of all ranks in the last checkpoint of a run."""
    checkpoint = layout.newest_checkpoint(directory)
    assert checkpoint is not None

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [tensor for each in value for tensor in tensors(each)]
        return [value] if isinstance(value, torch.Tensor) else []

    files = sorted((checkpoint / "zero").glob("*optim_states.pt"))
    return tensors([torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files])


def test_train_skips_damaged_checkpoint(prepared: Prepared, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "run.yaml",
        prepared.shards,
        prepared.tokenizer,
        training__max_steps=6,
        training__save_steps=2,
        training__save_total_limit=3,
        training__save_in_background=False,
        training__copy_checkpoints_to=str(tmp_path / "copies"),
    )
    train(2, "--config", recipe)
    before = losses(tmp_path / "run")
    torn = next((tmp_path / "run" / "checkpoint-6" / "zero").glob("*optim_states.pt"))
    torn.write_bytes(torn.read_bytes()[:-100])  # like a file that was not flushed before a power cut
    rotten = tmp_path / "run" / "checkpoint-4" / "zero" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(rotten.read_bytes())
    content[len(content) // 2] ^= 1  # the size is right
    rotten.write_bytes(content)
    output = train(2, "--config", recipe)
    assert f"warning: {torn} has" in output and f"warning: {rotten} does not have its SHA-256" in output
    assert f"resumed from {tmp_path / 'run' / 'checkpoint-2'}" in output
    assert losses(tmp_path / "run") == before
    for step in (4, 6):  # complete again
        path = tmp_path / "run" / f"checkpoint-{step}"
        assert layout.find_damage(path) is None
        assert {name: sha256_file(path / name) for name in layout.checksums(path)} == layout.checksums(path)

    copies = [path.name for path in layout.list_checkpoints(tmp_path / "copies") if layout.find_damage(path) is None]
    assert copies[-1] == "checkpoint-6"  # earlier ones are skipped if a copy takes longer than two steps
    for path in layout.list_checkpoints(tmp_path / "run"):
        layout.remove_checkpoint(path)
    assert find_resumable(load_config(recipe, [])) == tmp_path / "copies" / "checkpoint-6"


def test_train_write_failure_on_one_rank(prepared: Prepared, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, training__max_steps=4000, training__save_steps=2
    )
    processes = start_ranks(2, "--config", recipe)
    wait_for(tmp_path / "run" / "checkpoint-2", processes)
    resource.prlimit(
        processes[1].pid, resource.RLIMIT_FSIZE, (20_000, 20_000)
    )  # smaller than its part of the checkpoint
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    lines = [line for line in "".join(outputs).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in "".join(outputs), outputs
    for part in ("rank 1 on ", "cannot write ", "optim_states.pt: File too large; free disk space and restart"):
        assert part in lines[0]
    assert layout.newest_checkpoint(tmp_path / "run") is not None
    assert not list((tmp_path / "run").glob(".*.partial"))


@pytest.mark.parametrize(
    ("kind", "cause"), [("always", "rank 1 on "), ("once", "Repeating the step gave finite gradients: probably a")]
)
def test_train_stops_on_nonfinite_gradients(prepared: Prepared, tmp_path: Path, kind: str, cause: str) -> None:
    """A hook plants NaN gradients on rank 1 in the last micro-step of step 3; the loss is finite."""
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer)
    processes = start_ranks(2, kind, "--config", recipe, script="tests/planted_nan.py")
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [LOSS_FAILURE] * 2, outputs
    lines = [line for line in "".join(outputs).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in "".join(outputs), outputs
    for part in ("step 3: the gradient norm is not finite", cause):
        assert part in lines[0]
    assert (", pair ids " in lines[0]) is (kind == "always")
    assert len(losses(tmp_path / "run")) == 2
    for output in outputs:
        before, after = (re.search(f"weights {when} (\\w+)", output) for when in ("before", "after"))
        assert before and after and before[1] == after[1]


# Trains, and prints the newest complete checkpoint when the trackers are closed.
WATCH_TRACKERS = """
import sys
from pathlib import Path
from pipeline import train
from pipeline.checkpoint.layout import newest_checkpoint
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.training.trackers import Trackers

finish, run = Trackers.finish, Path(sys.argv.pop(1))

def watched(trackers):
    print("trackers close after", getattr(newest_checkpoint(run), "name", None), flush=True)
    finish(trackers)

Trackers.finish = watched
sys.exit(train.main(sys.argv[1:], StopSignal()))
"""


def test_train_signal_to_one_rank(prepared: Prepared, tmp_path: Path) -> None:
    """All ranks save at once. Trackers, which may wait for an upload until Slurm kills the job, are closed later."""
    settings = {"training__max_steps": 400}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings)
    processes = start_ranks(2, WATCH_TRACKERS, tmp_path / "run", "--config", recipe, script="-c")
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [STOPPED_BY_SIGNAL] * 2
    done = len(losses(tmp_path / "run"))
    assert 3 <= done < 400
    assert (tmp_path / "run" / f"checkpoint-{done}" / "COMPLETE").is_file()
    assert f"trackers close after checkpoint-{done}" in outputs[0]


def test_train_signal_during_validation(prepared: Prepared, tmp_path: Path) -> None:
    """A validation that would take minutes ends at once. The run has saved, and the restart validates this step."""
    shards = select_rows(prepared.shards, tmp_path / "eval", slice(None), times=200)
    settings = {"data__eval_shards": str(shards), "training__eval_steps": 2}
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **settings)
    processes = start_ranks(1, "--config", recipe)
    wait_for_step(tmp_path / "run", 2, processes)
    time.sleep(0.5)
    began = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    output = processes[0].communicate(timeout=120)
    assert time.monotonic() - began < 20
    assert processes[0].returncode == STOPPED_BY_SIGNAL and "stopped by SIGTERM after step 2" in output
    assert not validations(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2"
    assert layout.read_state(path)["validation"]["step"] == 0
    eval_shards = select_rows(prepared.shards, tmp_path / "fewer", slice(3))
    train(1, "--config", recipe, "--training.max_steps", 2, "--data.eval_shards", eval_shards)
    assert [record["step"] for record in validations(tmp_path / "run")] == [2]
    assert layout.read_state(path)["validation"]["step"] == 2 and layout.find_damage(path) is None


def wait_for(path: Path, processes: list) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert all(process.poll() in (None, 0) for process in processes), "a rank ended early"
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.001)


def wait_for_step(directory: Path, step: int, processes: list) -> None:
    deadline = time.monotonic() + 200
    while not (directory / "metrics.jsonl").exists() or len(losses(directory)) < step:
        assert all(process.poll() in (None, 0) for process in processes), "a rank ended early"
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": "ds_configs/zero3_offload.json"},
        {"model__activation_checkpointing": True, "training__sequence_parallel_size": 2},
        {"training__train_micro_batch_size_per_gpu": 2, "loss__memory_budget_mb": 0.05},
    ],
    ids=["CPU offload", "activation checkpointing, shared rows", "micro-batch of 2 in many chunks"],
)
def test_train_memory_settings_keep_losses(prepared: Prepared, plain_run: Path, tmp_path: Path, changes: dict) -> None:
    """Another order of fp32 sums differs by a few 1e-7 at first, which five steps amplify."""
    train(2, "--config", write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, **changes))
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=1e-5)
    norms = [[record["grad_norm"] for record in metrics(path)] for path in (plain_run, tmp_path / "run")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_train_bf16_close_to_fp32(prepared: Prepared, plain_run: Path, tmp_path: Path) -> None:
    """The losses differ by the rounding of the weights, 2^-8 relative."""
    recipe = write_recipe(tmp_path / "run.yaml", prepared.shards, prepared.tokenizer, training__precision="bf16")
    train(2, "--config", recipe)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=0.01)
    assert losses(tmp_path / "run") != losses(plain_run)

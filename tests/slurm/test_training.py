"""The whole chain on two nodes of a real Slurm, whose jobs are signalled and preempted, and a run that is cancelled."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.shards.format import read_manifest
from pipeline.checkpoint.export_record import ExportRecord, write_export_record
from pipeline.fault_tolerance.restarts import read_restart_log
from tests.conftest import Prepared
from tests.runs import losses, metrics, train, write_recipe
from tests.slurm.conftest import Cluster, log_of, until, wait_for_steps

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture(scope="module")
def recipe(checkout: Path) -> Path:
    changes = {"training__max_steps": STEPS, "training__train_batch_size": 8, "training__save_steps": 15}
    return write_recipe(checkout / "run.yaml", Path("shards"), Path("tokenizer"), output_dir="run", **changes)


@pytest.fixture(scope="module")
def chain(cluster: Cluster, checkout: Path, recipe: Path) -> Iterator[dict[str, str]]:
    """Job ids of slurm/submit.sh by name. Every stage has two ranks on two nodes.

    Evaluation has many short batches, so that a signal arrives between two of them.
    """
    variables = {
        "RECIPE": recipe, "INPUT": "train.jsonl", "TOKENIZER": "tokenizer", "SHARDS": "shards", "RUN": "run",
        "DATA": "test.jsonl", "PREPARE_FLAGS": "--nodes=2 --ntasks=2", "TRAIN_FLAGS": "--nodes=2",
        "EVALUATE_FLAGS": "--nodes=2", "PREPARE_ARGS": "--max_seq_length 512",
        "EVALUATE_ARGS": "--max_new_tokens 64 --batch_size 1",
    }  # fmt: skip
    stale = checkout / "run" / "hf"  # an export of an earlier checkpoint: evaluation must replace it
    stale.mkdir(parents=True)
    write_export_record(stale, ExportRecord("run", 1, "earlier", "fp32", "..", newest=True))
    output = cluster.run("slurm/submit.sh", cwd=checkout, **variables)
    jobs = dict(line.split() for line in output.splitlines())
    cluster.run("scontrol", "hold", jobs["evaluate"])  # until the test of the evaluation watches it
    yield jobs
    cluster.run("scancel", *jobs.values())


def test_submit_prepares_shards_on_two_nodes(
    cluster: Cluster, chain: dict[str, str], checkout: Path, prepared: Prepared
) -> None:
    assert list(chain) == ["prepare", "train", "evaluate"]
    assert cluster.end(chain["prepare"])["JobState"] == "COMPLETED", log_of(checkout)
    assert read_manifest(checkout / "shards") == read_manifest(prepared.shards)  # packed by two MPI ranks and by one
    assert "note:" not in log_of(checkout)  # MPI and enough CPUs were available


def test_train_signalled_and_preempted_is_bit_identical(
    cluster: Cluster, chain: dict[str, str], checkout: Path, prepared: Prepared, tmp_path: Path
) -> None:
    job, run = chain["train"], checkout / "run"
    wait_for_steps(run, 2)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.requeued(job, restarts=1)
    done = len(losses(run))
    assert (run / f"checkpoint-{done}" / "COMPLETE").is_file(), log_of(checkout)

    wait_for_steps(run, done + 2)
    urgent = cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap", "true", cwd=checkout)
    cluster.requeued(job, restarts=2)
    done = len(losses(run))
    assert (run / f"checkpoint-{done}" / "COMPLETE").is_file(), log_of(checkout)
    assert done < STEPS

    assert cluster.end(urgent)["JobState"] == "COMPLETED"
    assert cluster.end(job)["JobState"] == "COMPLETED", log_of(checkout)
    starts = read_restart_log(run)
    assert [event["status"] for event in starts if event["event"] == "end"] == [75, 75, 0]
    for key in ("seconds_since_signal", "seconds"):  # from signal to end; from process start to first step
        print(f"\n{key}: {[event[key] for event in starts if event.get(key) is not None]}")
    assert json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["ranks"] == 2
    assert (checkout / f"slurm-solar-train-{job}.log").is_file()

    paths = ["--data.shards", prepared.shards, "--data.tokenizer", prepared.tokenizer, "--output_dir", tmp_path]
    train(2, "--config", checkout / "run.yaml", *paths)
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(tmp_path)


def test_evaluate_resumes_after_signal(cluster: Cluster, chain: dict[str, str], checkout: Path) -> None:
    job, run = chain["evaluate"], checkout / "run"
    partial = run / "generations.partial"
    cluster.run("scontrol", "release", job)
    until(lambda: any(f.stat().st_size for f in partial.glob("rank-*.jsonl")), 300, lambda: log_of(checkout))
    cluster.run("scancel", "--signal=USR1", job)
    cluster.requeued(job, restarts=1)
    kept = sum(len(f.read_text().splitlines()) for f in partial.glob("*.jsonl"))
    assert kept > 0 and not (run / "evaluation.json").exists()
    assert cluster.end(job)["JobState"] == "COMPLETED", log_of(checkout)
    records = (checkout / "test.jsonl").read_text().splitlines()
    assert kept < len(records) == len((run / "generations.jsonl").read_text().splitlines())
    evaluated = (checkout / f"slurm-solar-evaluate-{job}.log").read_text()
    assert "ended with status 75: requeue\n" in evaluated
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["settings"]["max_new_tokens"] == 64
    assert evaluation["model"]["export"]["step"] == STEPS and evaluation["model"]["dtype"] == "float32"
    assert evaluated.count("written: run/evaluation.json") == 1  # the ranks formed one process group
    assert (run / "report.md").is_file()


def test_train_saves_when_cancelled(cluster: Cluster, chain: dict[str, str], checkout: Path, recipe: Path) -> None:
    cluster.end(chain["prepare"])
    run = checkout / "cancelled"
    job = cluster.sbatch("slurm/train.sh", "--output_dir", run.name, cwd=checkout, RECIPE=recipe)
    wait_for_steps(run, 2)
    cluster.run("scancel", job)
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), log_of(checkout)
    assert (run / f"checkpoint-{len(losses(run))}" / "COMPLETE").is_file(), log_of(checkout)

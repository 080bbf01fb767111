"""A time limit and a power failure on a real Slurm, which take minutes: pytest -m cluster_long tests/slurm -s"""

import time
from pathlib import Path

import pytest

from tests.runs import losses, write_recipe
from tests.slurm.conftest import Cluster, log_of, until, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.cluster_long]

STEPS = 160


@pytest.fixture(scope="module")
def recipe(cluster: Cluster, checkout: Path) -> Path:
    """Recipe of a run of about a minute; the losses of an uninterrupted run are in `whole`."""
    shards = ["--input", "train.jsonl", "--tokenizer", "tokenizer", "--output", "shards", "--max_seq_length", 512]
    cluster.run("python", "-m", "data_prep", "pack", *shards, cwd=checkout)
    changes = {"training__max_steps": STEPS, "training__train_batch_size": 8, "training__save_steps": 20}
    recipe = write_recipe(checkout / "run.yaml", Path("shards"), Path("tokenizer"), output_dir="whole", **changes)
    job = cluster.sbatch("--nodes=2", "slurm/train.sh", cwd=checkout, RECIPE=recipe)
    assert cluster.end(job)["JobState"] == "COMPLETED", log_of(checkout)
    assert len(losses(checkout / "whole")) == STEPS
    return recipe


def test_train_resumes_after_time_limit(cluster: Cluster, checkout: Path, recipe: Path) -> None:
    job = cluster.sbatch("--nodes=2", "slurm/train.sh", "--output_dir", "limited", cwd=checkout, RECIPE=recipe)
    wait_for_steps(checkout / "limited", 3)
    cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=3")  # USR1 is due 180 s before: now
    started = time.monotonic()
    cluster.requeued(job, restarts=1)
    print(f"\ntime limit: requeued {time.monotonic() - started:.0f} s after USR1 was due")
    cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=10")
    done = len(losses(checkout / "limited"))
    assert 3 <= done < STEPS
    assert (checkout / "limited" / f"checkpoint-{done}" / "COMPLETE").is_file()
    assert cluster.end(job)["JobState"] == "COMPLETED", log_of(checkout)
    assert losses(checkout / "limited") == losses(checkout / "whole")


def test_train_resumes_after_node_power_failure(cluster: Cluster, checkout: Path, recipe: Path) -> None:
    job = cluster.sbatch("--nodes=2", "slurm/train.sh", "--output_dir", "cut", cwd=checkout, RECIPE=recipe)
    wait_for_steps(checkout / "cut", 25)
    assert cluster.script("kill-node", "node2").returncode == 0
    cut = time.monotonic()
    until(lambda: cluster.job(job)["Restarts"] == "1", 120, lambda: f"{cluster.job(job)}")
    print(f"\npower failure: requeued after {time.monotonic() - cut:.0f} s")
    assert cluster.script("start-node", "node2").returncode == 0
    cluster.requeued(job, restarts=1)
    assert cluster.end(job)["JobState"] == "COMPLETED", log_of(checkout)
    assert "resumed from cut/checkpoint-" in log_of(checkout)
    assert losses(checkout / "cut") == losses(checkout / "whole")

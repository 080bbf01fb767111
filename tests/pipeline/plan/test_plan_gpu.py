"""The plan of the one GPU run there is, docs/bench/train_h200.csv: the figures that docs/scaling.md gives."""

import csv
from dataclasses import replace

import pytest

from pipeline.benchmarks.scale import ZERO, facts_of
from pipeline.benchmarks.step import model_fields
from pipeline.common.hardware import load_device
from pipeline.config.settings import Config, LossSettings, TrainingSettings
from pipeline.plan.prediction import GIB, Cluster, Plan
from pipeline.plan.workload import Run, Workload
from tests.runs import ROOT


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, str]]:
    with open(ROOT / "docs" / "bench" / "train_h200.csv", encoding="utf-8") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def plan_of(row: dict[str, str], mask_copies: bool, peer: bool) -> Plan:
    """One row of tokens on one GPU, in sequences of 128 of which two thirds count, a buffer of 64 MiB."""
    tokens = int(row["tokens"])
    config = Config(
        loss=LossSettings(memory_budget_mb=64),
        training=TrainingSettings(train_batch_size=1, train_micro_batch_size_per_gpu=1, precision="bf16"),
    )
    fields = model_fields(int(row["vocab_size"]), int(row["hidden_size"]), int(row["layers"]), row["tied"] == "True")
    work = Workload(tokens, tokens, tokens * 2 // 3, tokens // 128, tokens // 256, 1000)
    run = Run(config, facts_of(fields, 1), ZERO, work, 1, mask_copies=mask_copies)
    return Plan(replace(run, peer=peer), Cluster(1, 1, load_device("h200")))


@pytest.mark.parametrize(
    ("arm", "mask_copies", "planned"),
    [("solar", False, 8.2), ("solar", True, 11.2), ("plain", False, 26.8), ("plain", True, 29.8)],
)
def test_memory_beyond_the_engines(measured, arm, mask_copies, planned) -> None:
    memory = plan_of(measured[arm], mask_copies, arm == "plain").memory
    assert (memory.peak - memory.resident) / GIB == pytest.approx(planned, abs=0.05)
    assert float(measured[arm]["memory_gb"]) > planned - 0.5


def test_step_times(measured) -> None:
    planned = {arm: plan_of(row, False, arm == "plain").time.overlapped for arm, row in measured.items()}
    assert planned["solar"] == planned["weight 0"] == pytest.approx(0.459, abs=0.001)
    assert planned["plain"] == pytest.approx(float(measured["plain"]["step_s"]), rel=0.01)  # it fitted the host's time

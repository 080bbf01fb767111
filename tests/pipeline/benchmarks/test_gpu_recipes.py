"""The predictions beside the published measurements of recipes on a GPU."""

import csv

import pytest
import torch

from pipeline.benchmarks.common import ROOT
from pipeline.benchmarks.gpu_recipes import CASES, predict
from pipeline.plan.prediction import GIB


def test_published_predictions_are_those_of_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    with (ROOT / "docs" / "bench" / "gpu_recipes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cases = {case.name: case for case in CASES}
    assert rows
    for row in rows:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=row["machine"]: name)
        prediction = predict(cases[row["case"]])
        assert prediction.memory.peak / GIB == pytest.approx(float(row["planned_memory_gib"]), abs=0.006)
        assert prediction.time.overlapped == pytest.approx(float(row["planned_step_s"]), abs=0.0006)

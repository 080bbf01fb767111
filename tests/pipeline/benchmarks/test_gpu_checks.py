"""The checks of a GPU run all tests that need one."""

from pathlib import Path

from pipeline.benchmarks.common import ROOT
from pipeline.benchmarks.gpu_checks import TESTED


def test_gpu_checks_run_all_gpu_tests() -> None:
    folder, this = ROOT / "tests" / "pipeline", Path(__file__)
    tests = (file for file in folder.rglob("test_*.py") if file != this)
    marked = {file for file in tests if "pytest.mark.gpu" in file.read_text(encoding="utf-8")}
    assert {file.relative_to(folder).parts[0] for file in marked} == set(TESTED)

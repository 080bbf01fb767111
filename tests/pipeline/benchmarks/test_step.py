"""The benchmark of whole training steps."""

from pathlib import Path

import pytest

from pipeline.benchmarks import step
from pipeline.benchmarks.step_variants import MODULES, ONE_BY_ONE, PLAIN, WEIGHT_0
from tests.runs import run_forked_ranks


@pytest.mark.slow
@pytest.mark.parametrize("variant", [MODULES, ONE_BY_ONE, PLAIN])
def test_step_benchmark_runs_variant(variant: str) -> None:
    sizes = ["--vocab_size=512", "--hidden_size=64", "--layers=1", "--tokens=64", "--sequence=16", "--steps=2"]
    (measurements,) = run_forked_ranks(2, ["-m", "pipeline.benchmarks.step", f"--arm={variant}", "--ranks=2", *sizes])
    assert len(measurements["times"]) == 2 and min(measurements["times"]) > 0


def test_failed_variant_has_no_row_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variant works in the first of two rounds only."""
    calls: list[str] = []

    def launch(variant: str, _: object) -> dict[str, object]:
        calls.append(variant)
        if calls.count(WEIGHT_0) == 2 and variant == WEIGHT_0:
            raise RuntimeError("exit status 1")
        return {"times": [1.0], "processor_times": [1.0], "memory_gb": 1.0}

    monkeypatch.setattr(step, "launch", launch)
    arguments = ["step", "--arms", WEIGHT_0, PLAIN, "--output", str(tmp_path / "steps.csv")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="1"):
        step.main()
    assert "weight 0: exit status 1" in capsys.readouterr().err
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["arm", "solar", "plain"]

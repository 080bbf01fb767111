"""Test `make demo` with a few training steps: every stage, its output, and a second call."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from pipeline import demo
from tests.runs import ENVIRONMENT


def with_short_evaluation(stages: Callable[..., list[demo.Stage]]) -> Callable[..., list[demo.Stage]]:
    """Evaluate a few problems only: a model of four steps never ends an answer before the token limit."""
    limits: dict[str, list[str | Path]] = {"evaluate": ["--limit", "2"]}
    return lambda *args: [replace(s, command=s.command + limits.get(s.name, [])) for s in stages(*args)]


@pytest.mark.slow
def test_demo_runs_every_stage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, recipe = tmp_path / "demo", tmp_path / "demo.yaml"
    tree = yaml.safe_load(demo.RECIPE.read_text())
    tree["output_dir"] = str(run)
    tree["data"] = {"shards": f"{run}/shards", "tokenizer": f"{run}/tokenizer"}
    tree["training"] |= {"max_steps": 4, "save_steps": 2}
    recipe.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(demo, "RECIPE", recipe)
    monkeypatch.setattr(demo, "demo_stages", with_short_evaluation(demo.demo_stages))
    for key in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(key, ENVIRONMENT[key])

    demo.main([])
    first = capfd.readouterr().out
    assert first.count(" done in ") == 6
    for name in ("config.yaml", "report.md", "report.html", "evaluation.json", "checkpoint-4/COMPLETE"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").glob("events*"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["ce_loss"] < records[0]["ce_loss"] and 0 < records[-1]["align_cos"] <= 1
    assert AutoModelForCausalLM.from_pretrained(run / "hf").config.model_type == "qwen3"

    demo.main([])
    second = capfd.readouterr().out
    assert second.count(" skipped, ") == 6 and " done in " not in second

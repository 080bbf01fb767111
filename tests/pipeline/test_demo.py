"""Test `make demo` with little data and a few training steps: every stage, its output, and a second call."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from pipeline import demo
from pipeline.config.settings import Config
from pipeline.study.plan import plan_jobs
from pipeline.study.settings import StudySettings, read_study
from tests.runs import ENVIRONMENT, metrics

DATA = ("--languages", "en", "de", "sw", "--low_resource", "sw", "--train_problems", "60", "--low_resource_problems")
DATA += ("12", "--test_problems", "8")
demo_study = demo.demo_study


def with_short_evaluation(config: Config, ranks: int) -> StudySettings:
    """Generate few tokens: a model of four steps never ends an answer before the token limit."""
    return replace(demo_study(config, ranks), evaluate_args="--limit 2 --max_new_tokens 16")


@pytest.mark.slow
def test_demo_compares_sft_and_solar_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root, recipe = tmp_path / "demo", tmp_path / "demo.yaml"
    tree = yaml.safe_load(demo.RECIPE.read_text())
    tree["output_dir"] = str(root / "solar-seed42")
    tree["data"] = {"shards": f"{root}/shards-records", "tokenizer": f"{root}/tokenizer"}
    # One row per step, and so one rank: each rank of a process group takes seconds to start.
    tree["training"] |= {"max_steps": 4, "save_steps": 2, "train_batch_size": 1}
    recipe.write_text(yaml.safe_dump(tree))
    for name, value in (
        ("RECIPE", recipe),
        ("GENERATE", DATA),
        ("VOCABULARY", 600),
        ("demo_study", with_short_evaluation),
    ):
        monkeypatch.setattr(demo, name, value)
    for key in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(key, ENVIRONMENT[key])

    assert demo.main([]) == 0
    first = capfd.readouterr().out
    assert first.count(" took ") == 8 and f"see {root}/report/report.html" in first
    histories = {}
    for variant in ("sft", "solar"):
        run = root / f"{variant}-seed42"
        for name in ("config.yaml", "evaluation.json", "representations.json", "checkpoint-4/COMPLETE"):
            assert (run / name).stat().st_size > 0
        assert list((run / "tensorboard").glob("events*"))
        assert AutoModelForCausalLM.from_pretrained(run / "hf").config.model_type == "qwen3"
        histories[variant] = metrics(run)
        assert [record["step"] for record in histories[variant]] == [1, 2, 3, 4]
        assert histories[variant][-1]["ce_loss"] < histories[variant][0]["ce_loss"]
    sft, solar = histories["sft"], histories["solar"]
    # The same seed and the same rows; only the alignment differs.
    assert sft[0]["ce_loss"] == solar[0]["ce_loss"]
    assert [record["num_tokens"] for record in sft] == [record["num_tokens"] for record in solar]
    assert [record["align_weight"] for record in sft] == [0] * 4 and solar[-1]["align_weight"] > 0

    text = (root / "report" / "report.md").read_text()
    summary = text.splitlines()[2]
    assert summary.startswith("Comparison of 2 runs on 2 problems in 3 languages; sft-seed42 is the baseline.")
    assert ": no difference beyond noise. One seed: " in summary and "cosine of translations" in summary
    for row in (
        "mean of languages",
        "accuracy, mean of languages, %",
        "cosine of pairs, soft tokens (of shuffled pairs)",
    ):
        assert f"| {row} |" in text or f"| **{row}** |" in text, row
    assert "no difference beyond noise |" in text

    assert demo.main([]) == 0
    second = capfd.readouterr().out
    assert second.count("done already") == 8 and " took " not in second
    os.utime(root / "solar-seed42" / "evaluation.json")  # evaluated again: the report is out of date
    assert [job.name for job in plan_jobs(read_study(root)) if not job.done] == ["compare"]
    results = json.loads((root / "results.json").read_text())
    assert list(results["variants"]) == ["sft", "solar"]

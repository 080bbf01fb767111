"""A whole study on one machine with a tiny model: stopped in the middle of a training run, and resumed."""

import json
import signal
import time
from pathlib import Path

import pytest

from pipeline.study.settings import StudySettings
from tests.runs import ENVIRONMENT, Fork, metrics


def start(study: StudySettings, log: Path) -> Fork:
    words = ["-m", "pipeline.study", "run", "--ranks", "1", "--output", study.output, "--model", study.model]
    words += ["--recipe", study.recipe, "--train", *study.train, "--test", study.test]
    words += ["--variants", *study.variants, "--seeds", *map(str, study.seeds)]
    words += [f"--prepare_args={study.prepare_args}", f"--evaluate_args={study.evaluate_args}"]
    return Fork(words, ENVIRONMENT, log, log)


@pytest.mark.slow
def test_study_resumes_where_it_was_stopped(study: StudySettings, tmp_path: Path) -> None:
    first = start(study, tmp_path / "first.log")
    starts = study.run("sft", 2) / "starts.jsonl"
    deadline = time.monotonic() + 240
    while first.poll() is None and not (starts.exists() and "first step" in starts.read_text()):
        assert time.monotonic() < deadline, first.output.read_text()[-3000:]
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    text = first.communicate(timeout=120)
    assert first.returncode == 75, text[-3000:]
    assert "stopped by a signal during train-sft-seed2; run the same command to resume" in text
    assert not (study.root / "results.md").exists()

    second = start(study, tmp_path / "second.log")
    text = second.communicate(timeout=280)
    assert second.returncode == 0, text[-3000:]
    for name in ("prepare-records", "prepare-shuffled_pairs", "evaluate-base", "train-sft-seed1", "evaluate-sft-seed1"):
        assert f"] {name}: done already" in text
    steps = {}
    for name in study.variants:
        for seed in study.seeds:
            records = metrics(study.run(name, seed))
            assert [record["step"] for record in records] == list(range(1, 7))
            steps[name, seed] = records
    assert len({records[0]["ce_loss"] for records in steps.values()}) == 4  # data and seeds differ
    assert steps["sft", 1][0]["align_weight"] == 0 < steps["shuffled_pairs", 1][-1]["align_weight"]
    result = json.loads((study.root / "results.json").read_text())
    assert result["seeds"] == [1, 2] and set(result["variants"]) == {"base", *study.variants}
    assert 0 <= result["variants"]["shuffled_pairs"]["p"] <= 1
    assert (study.root / "report" / "report.html").is_file() and "| base |" in (study.root / "results.md").read_text()

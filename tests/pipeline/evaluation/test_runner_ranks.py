"""The accuracy of a model whose answers are known, evaluated on one and two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.common.launcher import free_port
from pipeline.evaluation.accuracy import accuracy_table
from tests.pipeline.evaluation.tiny_model import make_records, overfit, save, write_records
from tests.runs import ROOT


def run_ranks(world_size: int, output: Path, *words: str) -> None:
    """Run `python -m pipeline.evaluation WORDS` on several ranks without a GPU. None may end before the results exist.

    Slurm kills ranks that run for a minute longer than the first one that ends.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(world_size)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.evaluation", "--output", str(output), *words],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process in reversed(processes):
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert (output / "evaluation.json").exists()


@pytest.mark.slow
def test_evaluate_overfitted_model_on_one_and_two_ranks(tmp_path: Path, tokenizer):
    """The model reproduces its answers; wrong golds count against it; the number of ranks changes no byte."""
    records = make_records()
    model_dir = save(overfit(tokenizer, records), tokenizer, tmp_path / "model")
    tested = [dict(r) for r in records]
    for record in tested:  # two German golds differ from the model's answer
        if record["lang"] == "de" and record["pair_id"] in ("p0", "p3"):
            record["gold"] += 1
    data = write_records(tmp_path / "test.jsonl", tested)
    words = ["--model", str(model_dir), "--data", str(data), "--batch_size", "4"]
    words += ["--max_new_tokens", "40", "--dtype", "float32"]
    one, two = tmp_path / "out1", tmp_path / "out2"
    run_ranks(1, one, *words)
    run_ranks(2, two, *words)
    assert (one / "generations.jsonl").read_bytes() == (two / "generations.jsonl").read_bytes()
    result, other = (json.loads((out / "evaluation.json").read_text()) for out in (one, two))
    assert result["languages"] == other["languages"]
    assert {p.name for p in one.iterdir()} == {"generations.jsonl", "evaluation.json", "evaluation.md"}

    rows = [json.loads(line) for line in (one / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["pair_id"], r["lang"]) for r in rows] == [(r["pair_id"], r["lang"]) for r in records]
    assert [r["output"] for r in rows] == [r["answer"] for r in records]
    assert all(r["finished"] for r in rows)
    accuracies = {lang: score["accuracy"] for lang, score in result["languages"].items()}
    assert accuracies == {"bn": 1.0, "de": pytest.approx(4 / 6), "en": 1.0}
    assert result["macro"]["consistency_with_pivot"] == 1.0
    assert result["versions"]["torch"] == torch.__version__
    assert result["settings"]["batch_size"] == 4
    assert accuracy_table(result) in (one / "evaluation.md").read_text()
